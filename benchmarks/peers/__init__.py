"""The same jobs done by quantkit and by its peers: ``python -m benchmarks.peers``."""
