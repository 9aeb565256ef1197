"""The description of a run: TOML -> frozen pydantic models. Imports no torch, so a login node can
validate."""
