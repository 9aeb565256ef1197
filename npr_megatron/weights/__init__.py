"""Resharding in three layers: declared layout, explicit plan, dumb executor."""
