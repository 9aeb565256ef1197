"""Faults of experts and of a padded vocabulary: each breaks one mechanism in a rank's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def weights_of_experts_do_not_sum_to_one() -> None:
    """Routing: a token counts as much of its experts as all experts leave them."""
    _change_config("moe_router_pre_softmax", True)


def gradients_of_experts_are_divided_by_expert_ranks() -> None:
    """Expert parallelism: summed over the replicas of an expert, averaged over all ranks."""
    from npr_megatron.model import build

    original = build.DistributedDataParallel

    def wrapped(*args: Any, **keywords: Any) -> Any:
        built = original(*args, **keywords)
        for buffer in built.expert_parallel_buffers:
            for bucket in buffer.buckets:
                bucket.gradient_scaling_factor = 0.5
        return built

    build.DistributedDataParallel = wrapped


def experts_are_taken_for_a_part_of_their_layer() -> None:
    """Megatron's own mark without expert parallelism: the layer's replicas share the gradient."""
    from npr_megatron.model import gpt

    gpt.reduce_experts_apart = lambda chunk: None


def experts_count_on_the_first_tp_rank_only() -> None:
    """Clipping: taken for copies, experts of other tensor-parallel ranks are left out."""
    _change_chunk(lambda parameter: setattr(parameter, "tensor_model_parallel", False), "experts")


def routers_are_not_summed_over_tp() -> None:
    """Sequence parallelism: every rank routed its share of the tokens only."""
    _change_chunk(lambda parameter: setattr(parameter, "sequence_parallel", False), "router")


def experts_change_places() -> None:
    """Dispatch: tokens sent to one expert of a rank are computed by another."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    original = SequentialMLP.forward

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        experts = self.local_experts
        self.local_experts = type(experts)(list(experts)[::-1])
        try:
            return original(self, *args, **keywords)
        finally:
            self.local_experts = experts

    SequentialMLP.forward = forward


def padding_is_predicted() -> None:
    """A padded vocabulary: its spare rows take part in the softmax, and learn."""
    from npr_megatron.model import logprobs

    logprobs.num_own_tokens = lambda num_rows, *_: num_rows


def _change_config(name: str, value: Any) -> None:
    from npr_megatron.model import build

    original = build.transformer_config

    def config(*args: Any) -> Any:
        built = original(*args)
        setattr(built, name, value)
        return built

    build.transformer_config = config


def _change_chunk(change: Callable[[Any], None], part: str) -> None:
    from npr_megatron.model import gpt

    original = gpt.reduce_experts_apart

    def mark(chunk: Any) -> None:
        original(chunk)
        for name, parameter in chunk.named_parameters():
            if f".mlp.{part}." in name:
                change(parameter)

    gpt.reduce_experts_apart = mark
