"""Chat templates: what they write around messages, observed and translated for Ollama."""
