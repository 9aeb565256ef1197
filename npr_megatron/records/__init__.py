"""Frozen values that cross processes. numpy and the standard library only; no torch."""
