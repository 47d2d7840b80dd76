"""The run's lifecycle: the kit (facade), journal, schedule, retention."""
