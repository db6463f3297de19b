"""The manifest beside an artifact's weights, and the results of inspect and verify."""
