from faqd.entry import train

train()
