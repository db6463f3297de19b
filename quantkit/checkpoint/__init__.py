"""Checkpoints on disk: where they are found, read, written, and what lies beside the weights."""
