"""What trainer and engine layouts share: shapes inside a layer, and gate on top of up."""

from __future__ import annotations

from collections.abc import Mapping

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.weights.names import layer_parameters
from npr_megatron.weights.tiles import Index, Rows, rows_of

Shapes = Mapping[str, Index]
"""Shapes of the parameters of one layer by their names inside it."""


def layer_shapes(model: ModelConfig, moe: MoeConfig | None) -> Shapes:
    """Return the shapes inside a layer with the experts ``moe``, or inside a dense layer."""
    return {parameter.name: parameter.shape for parameter in layer_parameters(model, moe)}


def gated_rows(mlp: str, shapes: Shapes, part: int, num_parts: int) -> list[Rows]:
    """Return a shard of gate on top of the same shard of up."""
    names = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    return [rows_of(name, shapes[name][0], part, num_parts) for name in names]
