"""The command line: ls, inspect, verify, plan, diff, prune. No torch, so that it runs on a login node."""
