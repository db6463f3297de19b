"""What lies beside an artifact's weights, and what inspecting and verifying it finds."""
