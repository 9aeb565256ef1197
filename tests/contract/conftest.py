"""One engine per backend and session; every test leaves it as free as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from npr_megatron.engine.interface import Engine
from tests.contract.backends import BACKENDS, Backend, Subject
from tests.engines import assert_nothing_is_left, step_until


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
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
