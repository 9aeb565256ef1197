"""Validity, accuracy, parallelism and speed of a model."""
