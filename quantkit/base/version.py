"""The program's version; it is written nowhere else."""

__version__ = "0.1.0.dev1"
