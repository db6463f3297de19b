"""What an artifact will hold, decided before any work: the scheme and size of every tensor."""
