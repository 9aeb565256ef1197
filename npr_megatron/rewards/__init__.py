"""Scores of finished trajectories."""
