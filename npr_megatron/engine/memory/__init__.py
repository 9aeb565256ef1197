"""Which KV slot belongs to whom: integers only."""
