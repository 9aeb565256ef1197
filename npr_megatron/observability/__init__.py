"""Metrics and logs; standard library only."""
