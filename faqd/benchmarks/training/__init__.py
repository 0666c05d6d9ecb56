from faqd.command import wait_briefly

# Before torch is loaded, which every module here does.
wait_briefly()
