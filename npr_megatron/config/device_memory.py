"""What a trainer rank is estimated to keep on its device: pure arithmetic.

Weights, gradients and optimizer state are exact; activations are what autograd saves, without
recompute and without the dense mask that the CPU alone has. What kernels and communication need
besides is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.pipeline import split_layers
from npr_megatron.config.training import ParallelConfig, TrainerConfig

_BYTES = {"fp32": 4, "bf16": 2}
_GRADIENT_BYTES = 4
_MOMENTS_BYTES = 8
_MASTER_BYTES = {"fp32": 0, "bf16": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on the device of one rank."""

    weights: int
    gradients: int
    optimizer: int
    """This rank's share: the distributed optimizer cuts it over replicas."""
    activations: int
    """Of all microbatches that wait for their backward at once."""

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_memory(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig, stage: int
) -> RankMemory:
    """Return what a rank of pipeline stage ``stage`` keeps.

    Raises:
        LayoutError: the layers cannot be split as ``parallel`` asks.
    """
    chunks = split_layers(model.num_hidden_layers, parallel)[stage]
    layers = [layer for chunk in chunks for layer in chunk]
    shared, experts = _num_weights(model, parallel, stage, layers)
    replicas = parallel.dp_size * parallel.cp_size
    expert_replicas = parallel.ranks_per_stage // (parallel.ep_size * parallel.expert_tp_size)
    per_weight = _MOMENTS_BYTES + _MASTER_BYTES[trainer.dtype]
    return RankMemory(
        weights=(shared + experts) * _BYTES[trainer.dtype],
        gradients=(shared + experts) * _GRADIENT_BYTES,
        optimizer=per_weight * (-(-shared // replicas) + -(-experts // expert_replicas)),
        activations=_activations(model, parallel, trainer, stage, max(map(len, chunks))),
    )


def _num_weights(
    model: ModelConfig, parallel: ParallelConfig, stage: int, layers: list[int]
) -> tuple[int, int]:
    """Return the weights outside the routed experts, and those inside."""
    tp, hidden, last = parallel.tp_size, model.hidden_size, parallel.pp_size - 1
    step = parallel.vocab_divisor * tp
    vocabulary = -(-model.vocab_size // step) * step // tp * hidden
    is_tied_here = model.tie_word_embeddings and stage == 0
    shared = vocabulary * ((stage == 0) + (stage == last and not is_tied_here))
    shared += hidden * (stage == last)
    experts = 0
    for layer in layers:
        attention = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
        shared += attention * model.head_dim // tp * hidden + 2 * hidden
        shared += 2 * model.head_dim * model.has_qk_norm
        moe = model.moe
        if moe is None or layer < moe.num_dense_layers:
            shared += 3 * model.intermediate_size // tp * hidden
            continue
        shared += (moe.num_experts + 3 * moe.shared_intermediate_size // tp) * hidden
        inner = 3 * moe.moe_intermediate_size // parallel.expert_tp_size
        experts += moe.num_experts // parallel.ep_size * inner * hidden
    return shared, experts


def _activations(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig, stage: int, layers: int
) -> int:
    """``layers`` is the number of layers of the longest chunk."""
    tokens = trainer.rows_per_microbatch * trainer.row_tokens // parallel.cp_size
    element = _BYTES[trainer.dtype]
    saved = layers * _saved_in_a_layer(model, parallel) * tokens * element
    saved *= _num_waiting(parallel, stage)
    if stage == parallel.pp_size - 1:
        # Logits as computed, as fp32 softmax, and their gradient.
        logits = model.vocab_size // parallel.tp_size * tokens
        saved += logits * (8 if element == 4 else element + 8)
    return saved


def _num_waiting(parallel: ParallelConfig, stage: int) -> int:
    """Return how many chunks, over all microbatches, wait for their backward on ``stage``."""
    behind = parallel.pp_size - stage - 1
    if parallel.vpp_size == 1:
        return behind + 1
    return 2 * behind + (parallel.vpp_size - 1) * parallel.pp_size + 1


def _saved_in_a_layer(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the elements saved for each token: inputs of norms and products, and of attention."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    # Two norms: input and output, cut over the ranks by sequence parallelism.
    hidden = 4 * model.hidden_size
    # The fused product; queries and keys normed and rotated; what attention takes and returns.
    attention = 5 * queries + 7 * keys
    # Keys and values of other ranks' tokens.
    attention += 2 * (parallel.cp_size - 1) * keys
    # Gate and up, and the steps of the activation up to the input of the last product.
    mlp = 5 * _active_width(model, model.moe)
    return -(-(hidden + attention + mlp) // parallel.tp_size)


def _active_width(model: ModelConfig, moe: MoeConfig | None) -> int:
    if moe is None:
        return model.intermediate_size
    routed = moe.num_experts_per_tok * moe.moe_intermediate_size
    return max(model.intermediate_size * (moe.num_dense_layers > 0), routed) + (
        moe.shared_intermediate_size
    )
