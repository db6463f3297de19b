"""GPTQ: codes are chosen a column at a time, and later columns make up for earlier errors."""
