from faqd.deploy.cli import main

main()
