from faqd.entry import deploy

deploy()
