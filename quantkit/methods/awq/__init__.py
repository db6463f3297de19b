"""AWQ: inputs rescaled so that the weights that matter most are rounded most finely."""
