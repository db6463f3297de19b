"""How artifacts are stored: a file or folder for each format, and a registry of them."""
