"""The server on SGLang: what clients may rely on does not depend on the engine behind it.

The tests are those of ``tests/serving``, run over an SGLang engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live import Live, serving
from tests.serving.test_clients import *  # noqa: F403 - its tests are run here
from tests.serving.test_life import (  # noqa: F401 - run here
    test_a_client_that_hangs_up_gives_its_memory_back,
    test_an_async_client_that_stops_listening_gives_its_memory_back,
    test_clients_that_hang_up_at_any_moment_leave_nothing,
)
from tests.serving.test_refusals import (  # noqa: F401 - run here
    test_answers_that_memory_cannot_hold_are_told_how_many_tokens_it_can,
    test_what_is_too_long_says_what_would_fit,
)
from tests.speaker import write_speaker


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaker(tmp_path_factory.mktemp("speaker") / "hf")


@pytest.fixture(scope="module")
def live(speaker: Path) -> Iterator[Live]:
    with serving(speaker, backend="sglang", max_running=32) as live:
        yield live
