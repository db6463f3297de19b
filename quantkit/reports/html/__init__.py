"""The comparison as one HTML page, with its charts."""
