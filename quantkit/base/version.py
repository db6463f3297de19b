"""The program's version, which is written down here alone."""

__version__ = "0.1.0.dev1"
