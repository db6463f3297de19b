"""What every other package may use: errors, progress, threads, sizes, files, shipped data."""
