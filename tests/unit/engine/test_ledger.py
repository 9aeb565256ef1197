"""The budget: charged exactly, refused as a whole."""

from __future__ import annotations

from npr_megatron.engine.flow.ledger import Ledger
from npr_megatron.records.trajectory import FinishReason


def test_the_total_is_spent_to_the_last_token() -> None:
    ledger = Ledger(prompt_length=10, max_new_tokens=3, max_critical_path=100)
    assert ledger.verdict(3, 13) is None
    ledger.total += 2
    assert ledger.verdict(1, 13) is None
    assert ledger.verdict(2, 14) is FinishReason.LENGTH


def test_the_critical_path_counts_positions_behind_the_prompt() -> None:
    ledger = Ledger(prompt_length=10, max_new_tokens=100, max_critical_path=3)
    assert ledger.verdict(50, 13) is None
    assert ledger.verdict(1, 14) is FinishReason.CRITICAL_PATH


def test_a_spent_total_is_named_before_a_spent_path() -> None:
    ledger = Ledger(prompt_length=0, max_new_tokens=1, max_critical_path=1)
    ledger.total += 1
    assert ledger.verdict(1, 2) is FinishReason.LENGTH
