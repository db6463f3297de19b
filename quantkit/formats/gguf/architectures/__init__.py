"""The architectures that can be written as GGUF and read from it."""
