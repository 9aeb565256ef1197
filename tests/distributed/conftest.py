"""Starting weights, written once, and runs of one rank, trained once."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import MODEL
from tests.distributed.models import UNTIED, write_model
from tests.distributed.parity import Trainer


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """An HF folder of the tied test model."""
    return write_model(tmp_path_factory.mktemp("weights") / "tied", MODEL)


@pytest.fixture(scope="session")
def untied_hf_folder(tmp_path_factory):
    """The same with a head of its own."""
    return write_model(tmp_path_factory.mktemp("weights") / "untied", UNTIED)


@pytest.fixture(scope="session")
def trainer(tmp_path_factory) -> Trainer:
    """Training runs under any model and layout."""
    return Trainer(tmp_path_factory.mktemp("parity"))
