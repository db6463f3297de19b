"""Judging: likelihood against the baseline, and regression cases."""
