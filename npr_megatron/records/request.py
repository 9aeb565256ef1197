"""What an engine is asked to decode."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from npr_megatron.records.trajectory import DecodeMode


class RefusalPolicy(StrEnum):
    """What becomes of a trajectory whose fork is refused: it broke the schema or has no room.

    In either case no branch is opened: a fork happens as a whole or not at all.
    """

    TERMINATE = "terminate"  # it ends, with the rule or the budget as its reason: training
    SEQUENTIAL = "sequential"  # it goes on as plain causal text: serving


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One rollout to decode. Equal requests under equal weights give equal trajectories.

    What shapes the draw (temperature, filters, penalties) never shapes the record: log-probs are
    always those of the full distribution at temperature 1. At the defaults the draw is from that
    very distribution, which is what reinforcement learning needs. ``engine.compute.sampler`` says
    in which order they apply.

    Example::

        GenerationRequest(prompt_id="train/7", rollout=3, prompt_ids=(5, 6), seed=0x1234,
                          mode=DecodeMode.PARALLEL, max_new_tokens=256, max_critical_path=160)
    """

    prompt_id: str
    rollout: int
    prompt_ids: tuple[int, ...]
    mode: DecodeMode
    max_new_tokens: int
    """Total generated tokens over all branches, forced ones included."""
    max_critical_path: int
    """Generated positions (longest path); at least 1."""
    seed: int
    """64-bit key; every branch derives its own stream from it (see ``records.randomness``)."""
    temperature: float = 1.0
    """0.0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus mass: the likeliest tokens that together reach it, in (0, 1]; 1.0 keeps all."""
    top_k: int = 0
    """Only so many of the likeliest tokens, and those as likely as the last one; 0 keeps all."""
    min_p: float = 0.0
    """Only tokens at least so likely, as a share of the likeliest one, in [0, 1]; 0.0 keeps all."""
    repetition_penalty: float = 1.0
    """Makes less likely what the stream sees already: prompt, trunk and joined branches; inside a
    branch its own tokens too, never a sibling's. 1.0 changes nothing, below 1.0 encourages."""
    step_repetition_penalty: float = 1.0
    """The same inside a branch, over the tokens generated in that branch only; on top of the other.
    The released engine has 1.02."""
    on_refusal: RefusalPolicy = RefusalPolicy.TERMINATE
    """What becomes of the trajectory when a fork is refused."""
    timeout_s: float | None = None
    """Seconds from ``Engine.add`` to the end; what is written by then is returned. None waits."""

    @property
    def draws_from_policy(self) -> bool:
        """Whether nothing shapes the draw: temperature 1, no filter, no penalty."""
        filters = (self.top_k, self.top_p, self.min_p)
        penalties = (self.repetition_penalty, self.step_repetition_penalty)
        return self.temperature == 1.0 and filters == (0, 1.0, 0.0) and penalties == (1.0, 1.0)

    @property
    def request_id(self) -> str:
        """Unique within one batch of requests."""
        return f"{self.prompt_id}#{self.rollout}"
