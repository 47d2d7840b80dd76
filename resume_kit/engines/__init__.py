"""What the kit needs of an engine, the adapters that provide it, and the ranks' coordination."""
