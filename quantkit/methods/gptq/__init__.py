"""GPTQ: codes are chosen column by column, each compensating for the errors of those before it."""
