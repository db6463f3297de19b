"""The data that ships with the program: recipes, suites, calibration text and the demo model.

In a checkout they are folders beside the package; in an installed wheel they are in its folder
``data``.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def _folder(name: str) -> Path:
    installed = _PACKAGE / "data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipes() -> Path:
    """The folder of the shipped recipes."""
    return _folder("recipes")


def suites() -> Path:
    """The folder of the shipped suites."""
    return recipes() / "suites"


def calibration() -> Path:
    """The folder of the shipped calibration text."""
    return _folder("calibration")


def demo_model() -> Path:
    """The bundled BF16 model, a checkpoint directory."""
    return _folder("demo") / "model"


def demo_adapter() -> Path:
    """The bundled LoRA adapter of the demo model, a directory."""
    return _folder("demo") / "adapter"
