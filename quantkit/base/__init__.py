"""What every other package may use: errors, progress, threads, files, sizes, shipped data."""
