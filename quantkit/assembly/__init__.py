"""Artifacts put together, piece by piece, so that a run that is killed can go on."""
