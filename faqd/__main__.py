from faqd.cli import main

main()
