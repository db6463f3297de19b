"""One script for each kind of engine, run by path by that engine's own interpreter."""
