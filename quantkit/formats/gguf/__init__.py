"""GGUF: llama.cpp's file format, planned, written and read."""
