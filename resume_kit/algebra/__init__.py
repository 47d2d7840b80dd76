"""The lowest layer: boxes in global tensor coordinates and the fingerprint over them. No torch, no I/O."""
