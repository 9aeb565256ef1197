"""The Ray-managed fleet of engines."""
