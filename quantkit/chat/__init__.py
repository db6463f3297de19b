"""Chat templates: what they write around messages, and the same said in Go for Ollama."""
