"""What was measured and decided: frozen dataclasses that become JSON."""
