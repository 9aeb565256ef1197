"""Map, Process, Reduce over token ids: no model, no memory, shared by every backend."""
