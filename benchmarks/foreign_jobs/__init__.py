"""The peers' side of ``benchmarks.foreign``: scripts that their own interpreters run by path.

They import one another as neighbors, and nothing of quantkit, which a peer's environment lacks.
"""
