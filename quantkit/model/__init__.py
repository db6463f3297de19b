"""Any decoder of transformers, observed rather than described: shape, names, one block at a time."""
