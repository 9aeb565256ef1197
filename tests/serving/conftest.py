"""Models and servers that the tests of the server share."""

from __future__ import annotations

import pytest

from tests.serving.live import serving
from tests.speaker import write_speaker
from tests.unit.cli.npr import Npr


@pytest.fixture(scope="package")
def speaker(tmp_path_factory):
    """A model whose answers branch."""
    return write_speaker(tmp_path_factory.mktemp("speaker") / "hf")


@pytest.fixture(scope="package")
def live(speaker):
    """A server that all tests share which leave it well."""
    with serving(speaker) as live:
        yield live


@pytest.fixture
def npr(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    return Npr(monkeypatch, capsys)
