"""QuantKit: a recipe in, a judged artifact and one table out."""

__version__ = "0.1.0"
