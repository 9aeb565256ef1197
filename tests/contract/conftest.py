"""One engine per backend; every test leaves it as free as it found it.

The last one lives until the last test of this folder, and its idle ranks take half of two cores to
ask one another for work: so tests with engines of their own come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from npr_megatron.engine.interface import Engine
from tests.contract.backends import BACKENDS, Backend, Subject
from tests.engines import assert_nothing_is_left, step_until

_WHATEVER_THE_RANKS = ("test_ends.py", "test_events.py", "test_intake.py")
"""What is decided in front of the model, by code that knows of no ranks."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Spare several ranks on few cores what one rank has shown, and order the rest."""
    here = Path(__file__).parent
    spared = [
        item
        for item in items
        if item.path.parent == here
        and item.path.name in _WHATEVER_THE_RANKS
        and isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and any(
            isinstance(value, Backend) and value.config.tp_size > 1
            for value in item.callspec.params.values()
        )
    ]
    config.hook.pytest_deselected(items=spared)
    items[:] = [item for item in items if item not in spared]
    items.sort(key=lambda item: item.path != here / "test_pressure.py")


@pytest.fixture(scope="package", params=BACKENDS, ids=lambda backend: backend.name)
def started(request: pytest.FixtureRequest) -> Iterator[Subject]:
    backend: Backend = request.param
    if backend.absence:
        pytest.skip(backend.absence)
    subject = Subject.start(backend)
    yield subject
    subject.engine.close()
    subject.engine.close()


@pytest.fixture
def subject(started: Subject) -> Iterator[Subject]:
    yield started
    engine = started.engine
    for request_id in list(engine.unfinished):  # of a test that failed
        engine.abort(request_id)
    step_until(engine, lambda: not engine.num_unfinished, within_s=20.0)
    assert_nothing_is_left(engine)


@pytest.fixture
def backend(subject: Subject) -> Backend:
    return subject.backend


@pytest.fixture
def engine(subject: Subject) -> Engine:
    return subject.engine
