"""GGUF files: metadata, tokenizer, tensor names and types, written and read."""
