"""Is a checkpoint whole (verify), and how do two differ (compare)? No torch."""
