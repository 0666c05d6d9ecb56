from faqd.entry import umbrella

umbrella()
