from faqd.benchmarks.cli import main

main()
