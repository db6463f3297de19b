"""Model directories in safetensors: locating, reading and writing them."""
