"""What was measured and decided, as frozen dataclasses that become JSON."""
