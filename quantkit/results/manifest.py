"""quantkit.json, an artifact's manifest, and run.json beside it."""

from __future__ import annotations

MANIFEST = "quantkit.json"
RUN = "run.json"
