"""What each model type of the installed transformers gets: docs/models.md."""
