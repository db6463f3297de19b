"""``python -m quantkit.cli`` is ``quantkit``."""

from quantkit.cli import main

main()
