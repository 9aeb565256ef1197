"""Fixtures of the command-line tests."""

from __future__ import annotations

import pytest

from tests.unit.cli.npr import Npr


@pytest.fixture
def npr(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    return Npr(monkeypatch, capsys)
