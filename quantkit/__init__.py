"""QuantKit: from a BF16 language model to a quantized release you can defend.

The functions do what the commands of the same name do; docs/python.md shows them at work.
"""

from quantkit.api import (
    bench,
    compare,
    dry_run,
    evaluate,
    inspect,
    load_recipe,
    load_suite,
    merge,
    quantize,
    sweep,
    verify,
)
from quantkit.base.errors import InputError, MachineError, QuantkitError
from quantkit.base.version import __version__
from quantkit.results.cost import Load

__all__ = [
    "InputError",
    "Load",
    "MachineError",
    "QuantkitError",
    "__version__",
    "bench",
    "compare",
    "dry_run",
    "evaluate",
    "inspect",
    "load_recipe",
    "load_suite",
    "merge",
    "quantize",
    "sweep",
    "verify",
]
