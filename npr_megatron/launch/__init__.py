"""Roles to machines: placement, Ray, trainer ranks, preflight."""
