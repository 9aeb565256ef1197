"""Fixtures of the server's unit tests."""

from __future__ import annotations

from tests.unit.data.test_tokenizer import of_bytes

__all__ = ["of_bytes"]
