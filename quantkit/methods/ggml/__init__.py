"""ggml's block types: the library's own choice of codes, and ours with error feedback."""
