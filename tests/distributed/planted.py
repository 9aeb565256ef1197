"""Faults of parallel training: each breaks one mechanism in a rank's process, silently.

The last two are no faults: they choose the form of attention, which the length of rows chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def norms_are_not_summed_over_tp() -> None:
    """Sequence parallelism: every rank saw its share of the tokens only."""
    from npr_megatron.model.norm import RMSNorm

    original = RMSNorm.__init__

    def init(self: RMSNorm, *args: Any, **keywords: Any) -> None:
        original(self, *args, **keywords)
        weight: Any = self.weight
        weight.sequence_parallel = False

    RMSNorm.__init__ = init


def tied_embedding_is_not_summed_over_pp() -> None:
    """First and last stage each hold a copy of a tied embedding."""
    import sys

    from megatron.core.distributed import finalize_model_grads as finalize

    module: Any = sys.modules[finalize.__module__]
    module._allreduce_word_embedding_grads = lambda *_: None


def messages_are_batched() -> None:
    """Interleaved chunks on two stages: batched messages change places."""
    from npr_megatron.model import build

    original = build.transformer_config

    def config(*args: Any) -> Any:
        built = original(*args)
        built.batch_p2p_comm = True
        return built

    build.transformer_config = config


def chunks_run_in_the_wrong_order() -> None:
    """Interleaved chunks: two in the middle are taken for one another by the schedule."""
    from npr_megatron.train import passes

    original = passes.get_forward_backward_func

    def swapped() -> Any:
        run = original()

        def schedule(*, model: list[Any], **keywords: Any) -> Any:
            first, *middle, last = model
            return run(model=[first, *middle[::-1], last], **keywords)

        return schedule

    passes.get_forward_backward_func = swapped


def layers_of_a_stage_change_places() -> None:
    """Uneven stages: a stage runs its layers from the last to the first."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    original = TransformerBlock.forward

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        layers = self.layers
        self.layers = type(layers)(list(layers)[::-1])
        try:
            return original(self, *args, **keywords)
        finally:
            self.layers = layers

    TransformerBlock.forward = forward


def gradients_stay_with_their_replica() -> None:
    """Data parallelism: each replica keeps the gradient of its own microbatches."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    module: Any = buffers

    def keep(output: Any, *_: Any, **__: Any) -> None:
        del output  # a view of the input: this replica's own sum

    module.dist_reduce_scatter_func = keep


def gradients_are_divided_by_replicas() -> None:
    """Data parallelism: DDP averages what is divided by the tokens of all replicas anyway."""
    from npr_megatron.model import build

    original = build.DistributedDataParallel

    def wrapped(config: Any, *args: Any, **keywords: Any) -> Any:
        config.calculate_per_token_loss = False
        built = original(config, *args, **keywords)
        config.calculate_per_token_loss = True
        return built

    build.DistributedDataParallel = wrapped


def weights_are_read_before_they_are_gathered() -> None:
    """Overlapped gather: after a step a rank has new values for its own shard only."""
    from npr_megatron.train.rank import TrainerRank

    TrainerRank.gather_weights = lambda self: None


def rows_leak() -> None:
    """Packing: a token sees the samples before its own in the row."""
    _change_labels(lambda segment, branch: (segment.clip(max=0), branch))


def branches_leak() -> None:
    """A token sees the branches before its own in the block."""
    _change_labels(lambda segment, branch: (segment, branch.clip(max=1)))


def _change_labels(change: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Let core attention see who sees whom by changed labels, in either of its forms on a CPU."""
    from npr_megatron.model import attention

    dense_mask, plan = attention.dense_mask, attention.attention_plan

    def leaky_mask(segment: Any, block: Any, branch: Any) -> Any:
        segment, branch = change(segment, branch)
        return dense_mask(segment, block, branch)

    def leaky_plan(segment: Any, block: Any, branch: Any, slices: Any) -> Any:
        segment, branch = change(segment, branch)
        return plan(segment, block, branch, slices)

    attention.dense_mask, attention.attention_plan = leaky_mask, leaky_plan


def keys_of_other_ranks_are_taken_for_ones_own() -> None:
    """Context parallelism: gathered keys are taken as if they lay in the order of the row."""
    import numpy as np

    from npr_megatron.model import attention

    attention.gathered_columns = lambda length, size: np.arange(length, dtype=np.int32)
    attention.row_order = lambda gathered, size: gathered


def gradients_of_keys_stay_where_they_were_looked_at() -> None:
    """Context parallelism: a rank's keys learn from its own queries only."""
    from npr_megatron.model import attention

    original = attention.gather_from_sequence_parallel_region

    def gather(tensor: Any, *, tensor_parallel_output_grad: bool, group: Any) -> Any:
        return original(tensor, tensor_parallel_output_grad=False, group=group)

    attention.gather_from_sequence_parallel_region = gather


def attention_is_by_segments() -> None:
    """Choose the form for long rows."""
    from npr_megatron.model import attention

    attention.segments_pay = lambda *_: True


def attention_is_under_a_mask() -> None:
    """Choose the form for short rows."""
    from npr_megatron.model import attention

    attention.segments_pay = lambda *_: False
