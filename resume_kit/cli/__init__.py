"""The command line: ls, inspect, verify, diff, prune. No torch, so that it runs on a login node."""
