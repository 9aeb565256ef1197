"""Where every element of a model lives: pure declarations of the trainer, engine and HF layouts.

A new parallelism or engine is a new declaration here; planner, verifier, digest and executors know
nothing but tiles. Sizes that do not divide are refused here, all at once.
"""

from __future__ import annotations

from npr_megatron.config.model import ModelConfig
from npr_megatron.weights.layouts.engine import EngineKind, engine_layout
from npr_megatron.weights.layouts.trainer import trainer_layout
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.tiles import Layout, rank_of, whole

__all__ = ["EngineKind", "canonical_layout", "engine_layout", "trainer_layout"]


def canonical_layout(model: ModelConfig) -> Layout:
    """Return the layout of an HF checkpoint: one rank, one storage per parameter."""
    pieces = [whole(p.name, p.name, p.shape, p.dtype) for p in canonical_parameters(model)]
    return Layout("canonical", (rank_of(pieces),))
