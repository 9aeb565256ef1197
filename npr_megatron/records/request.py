"""What an engine is asked to decode."""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.records.trajectory import DecodeMode


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One rollout to decode. Equal requests under equal weights give equal trajectories.

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
    """Nucleus mass; 1.0 samples the whole distribution, of which log-probs always are."""

    @property
    def request_id(self) -> str:
        """Unique within one batch of requests."""
        return f"{self.prompt_id}#{self.rollout}"
