"""Calibration: text becomes rows of tokens, and rows become statistics of what linears read."""
