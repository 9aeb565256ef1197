"""The base of every section: frozen, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the run file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
