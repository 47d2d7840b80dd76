"""Training entry points and launchers."""
