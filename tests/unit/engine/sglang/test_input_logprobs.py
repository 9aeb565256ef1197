"""Whoever ended while a batch ran, those that are left get their own log-probs."""

from __future__ import annotations

import pytest

from npr_megatron.engine.sglang.scheduler.input_logprobs import with_own_cursor

LENGTHS, STARTS = [4, 1, 5, 3], [2, 0, 5, 1]
OF_EACH = [["a", "b"], ["c"], [], ["d", "e"]]
ALL = [logprob for own in OF_EACH for logprob in own]


@pytest.mark.parametrize("gone", [set(), {0}, {1}, {0, 1}, {2}, {0, 1, 2}])
def test_each_request_is_given_its_own(gone):
    found: dict[int, list[str]] = {}

    def apply(_processor: object, *, i: int, logprob_pt: int, **_: object) -> int:
        end = logprob_pt + LENGTHS[i] - STARTS[i]
        found[i] = ALL[logprob_pt:end]
        return end

    cursor = 0
    for i in range(len(LENGTHS)):
        if i not in gone:  # SGLang does not call it for the others, and keeps its cursor
            cursor = with_own_cursor(
                apply,
                None,
                i=i,
                extend_input_len_per_req=LENGTHS,
                extend_logprob_start_len_per_req=STARTS,
                logprob_pt=cursor,
            )
    assert found == {i: own for i, own in enumerate(OF_EACH) if i not in gone}
