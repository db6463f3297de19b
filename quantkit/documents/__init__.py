"""YAML files in which no misspelt key is ignored, and the data sets that they name."""
