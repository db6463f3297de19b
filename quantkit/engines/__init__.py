"""What runs artifacts: transformers, torch's 4-bit kernel, llama.cpp and vLLM."""
