"""ggml's types: ggml's own choice of codes, and ours with error feedback."""
