"""YAML files in which every key is checked, and the data sets that they name."""
