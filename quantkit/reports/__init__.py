"""Results for people: on the terminal and as Markdown."""
