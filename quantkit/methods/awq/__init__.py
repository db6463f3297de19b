"""AWQ: inputs are rescaled so that the weights that matter most are rounded most finely."""
