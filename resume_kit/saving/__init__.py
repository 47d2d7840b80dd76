"""Capture, stage (the arena is the file), write, commit."""
