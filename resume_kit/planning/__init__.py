"""Decisions made on boxes alone: who owns what, who reads what. No torch, no process group."""
