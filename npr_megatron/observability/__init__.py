"""Metrics and logs. Standard library only, so that every process and every login node can read
them."""
