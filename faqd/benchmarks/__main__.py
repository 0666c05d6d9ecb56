from faqd.entry import bench

bench()
