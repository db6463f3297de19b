"""Calibration: text into rows of tokens, rows into statistics, and what may be rescaled."""
