"""What an engine holds and has done, as numbers for people and metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counts:
    """What happened since the start; the fields of :class:`EngineStats` say what each is."""

    num_preemptions: int = 0
    num_replayed_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One look at an engine."""

    num_running: int
    num_waiting: int
    num_kv_slots_held: int
    """Keys and values in use [tokens], prompts included."""
    num_kv_slots_idle: int
    """Those of prompts that nobody uses now; given up when room is needed."""
    num_preemptions: int
    num_replayed_tokens: int
    """Tokens computed again because of preemptions."""
    num_prompt_tokens: int
    """Prompt tokens of admitted requests, all but each prompt's last."""
    num_cached_prompt_tokens: int
    """How many of them were in the pool already."""

    @classmethod
    def of(cls, counts: Counts, **now: int) -> EngineStats:
        """Return a look at an engine.

        Args:
            now: the fields that are no counts.
        """
        return cls(**asdict(counts), **now)
