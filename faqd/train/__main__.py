from faqd.train.cli import main

main()
