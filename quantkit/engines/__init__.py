"""What runs an artifact: transformers, our packed 4-bit linears, llama.cpp."""
