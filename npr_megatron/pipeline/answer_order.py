"""What ``npr generate`` is asked for. No torch, so that the command line can say it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from npr_megatron.records.request import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOrder:
    """Questions, how to answer them, and on what.

    Example::

        AnswerOrder(model_folder=Path("stages/npr/hf"), questions={"prompt 1": "a:1+2?"},
                    template=GenerationRequest(prompt_id="", rollout=0, prompt_ids=(), ...))
    """

    model_folder: Path
    """HF folder with tokenizer."""
    questions: Mapping[str, str]
    """Name to text."""
    template: GenerationRequest
    """Mode, sampling, budget and timeout of every request; its seed keys the seeds of all of
    them."""
    num_samples: int = 1
    """Answers per question."""
    is_budget_firm: bool = False
    """A long prompt is refused if the budget does not fit behind it; otherwise it gets less."""
    backend: Literal["embedded", "sglang"] = "embedded"
    tp_size: int = 1
    """Devices that share one SGLang engine."""
    dp_size: int = 1
    """Copies of the model in one SGLang engine."""
    device: str | None = None
    """``cpu``, ``cuda`` or ``cuda:1``; None takes CUDA where there is some."""
    dtype: Literal["fp32", "bf16"] | None = None
    """None takes bf16 on CUDA and fp32 elsewhere."""
    weights: Literal["as_trained", "fp8"] = "as_trained"
    max_running: int = 128
    """Answers decoded at once."""
