"""LoRA adapters: their settings, their arithmetic, and a checkpoint that reads as if merged."""
