"""QuantKit: a recipe in, a judged artifact and one table out."""

from quantkit.base.version import __version__

__all__ = ["__version__"]
