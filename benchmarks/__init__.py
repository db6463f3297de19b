"""Measurements of quantkit and its peers: ``python -m benchmarks.NAME``, at the checkout's root."""
