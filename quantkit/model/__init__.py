"""Any decoder of transformers, observed rather than described, one block at a time."""
