"""faqd: distil a float network into an integer one without labels, lower it exactly, and prove it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("faqd")
except PackageNotFoundError:  # a plain checkout that was never installed
    __version__ = "0+unknown"
