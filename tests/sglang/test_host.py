"""What SGLang tells of a request, as the pieces of a stage's answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
"""SGLang's imports warn."""


def piece(num_tokens: int, scored: list[float], reason: dict[str, Any] | None = None) -> dict:
    """What SGLang's tokenizer manager yields once ``num_tokens`` tokens are there."""
    return {
        "output_ids": [20 + i for i in range(num_tokens)],
        "meta_info": {
            "finish_reason": reason,
            "completion_tokens": num_tokens,
            "input_token_logprobs": [(None, 5, None), *((x, 6, None) for x in scored)],
            "output_token_logprobs": [(-1.0 - i, 20 + i, None) for i in range(num_tokens)],
            "cached_tokens": 3,
        },
    }


def test_a_request_retracted_before_its_first_token_tells_its_scores_later():
    from npr_megatron.engine.sglang.host import _Answers

    answers = _Answers(SimpleNamespace(config_value=lambda name: "4"))
    retracted = piece(0, [])
    retracted["meta_info"]["input_token_logprobs"] = []
    assert not answers.is_news(retracted)
    first = piece(1, [-0.5, -0.25])
    assert answers.is_news(first)
    assert answers.convert(first).scored == [-0.5, -0.25]
    assert not answers.is_news(piece(1, [-0.5, -0.25]))
    last = piece(3, [-0.5, -0.25], {"type": "stop"})
    assert answers.is_news(last)
    result = answers.convert(last)
    assert (result.token_ids, result.logprobs, result.scored) == ([21, 22], [-2.0, -3.0], [])
    assert result.is_last


def test_a_stage_that_only_computes_has_one_piece():
    from npr_megatron.engine.sglang.host import _Answers

    answers = _Answers(SimpleNamespace(config_value=lambda name: "4"))
    only = piece(0, [-0.5], {"type": "length"})
    assert answers.is_news(only)
    assert answers.convert(only).scored == [-0.5]
