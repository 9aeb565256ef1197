"""What a trainer rank is estimated to keep on its device: pure arithmetic.

Weights, gradients and AdamW's state are exact, Muon's is at most what AdamW's would be. Activations
are what autograd saves, without the dense mask that the CPU alone has; the workspace is the larger
of what the head and a recomputed layer need for a moment. What kernels and communication need
besides is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from npr_megatron.config.head_slices import slice_width
from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.pipeline import split_layers
from npr_megatron.config.training import ParallelConfig, TrainerConfig

_BYTES = {"fp32": 4, "bf16": 2}
_GRADIENT_BYTES = 4
_MOMENTS_BYTES = 8
_FP8_COPIES = 2
_MASTER_BYTES = {"fp32": 0, "bf16": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on the device of one rank."""

    weights: int
    gradients: int
    optimizer: int
    """This rank's share: the distributed optimizer cuts it over replicas, and the CPU may have a
    part of it."""
    activations: int
    """Of all microbatches that wait for their backward at once."""
    workspace: int
    """For a moment: a slice of the logits, or what is computed again of one layer."""

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


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
    return RankMemory(
        weights=(shared + experts) * _BYTES[trainer.dtype]
        + _fp8_copies(model, parallel, trainer, layers),
        gradients=(shared + experts) * _GRADIENT_BYTES,
        optimizer=_optimizer_state(parallel, trainer, shared, experts),
        activations=_activations(model, parallel, trainer, stage, max(map(len, chunks))),
        workspace=_workspace(model, parallel, trainer, stage),
    )


def _optimizer_state(
    parallel: ParallelConfig, trainer: TrainerConfig, shared: int, experts: int
) -> int:
    """Return the bytes that belong to this many weights outside and inside of experts."""
    per_weight = _MOMENTS_BYTES + _MASTER_BYTES[trainer.dtype]
    if trainer.optimizer == "muon":  # it needs whole matrices, so nothing is cut over replicas
        return per_weight * (shared + experts)
    replicas = parallel.dp_size * parallel.cp_size
    expert_replicas = parallel.ranks_per_stage // (parallel.ep_size * parallel.expert_tp_size)
    own = -(-shared // replicas) + -(-experts // expert_replicas)
    return round(per_weight * own * (1.0 - trainer.optimizer_offload_frac))


def _num_weights(
    model: ModelConfig, parallel: ParallelConfig, stage: int, layers: list[int]
) -> tuple[int, int]:
    """Return the weights outside the routed experts, and those inside."""
    tp, hidden, last = parallel.tp_size, model.hidden_size, parallel.pp_size - 1
    vocabulary = parallel.padded_vocab_size(model.vocab_size) // tp * hidden
    is_tied_here = model.tie_word_embeddings and stage == 0
    shared = vocabulary * ((stage == 0) + (stage == last and not is_tied_here))
    shared += hidden * (stage == last)
    experts = 0
    for layer in layers:
        outside, inside = _layer_weights(model, parallel, layer)
        shared, experts = shared + outside, experts + inside
    return shared, experts


def _layer_weights(model: ModelConfig, parallel: ParallelConfig, layer: int) -> tuple[int, int]:
    """Return the weights of one layer outside the routed experts, and those inside."""
    tp, hidden = parallel.tp_size, model.hidden_size
    attention = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    shared = attention * model.head_dim // tp * hidden + 2 * hidden
    shared += 2 * model.head_dim * model.has_qk_norm
    moe = model.moe
    if moe is None or layer < moe.num_dense_layers:
        return shared + 3 * model.intermediate_size // tp * hidden, 0
    shared += (moe.num_experts + 3 * moe.shared_intermediate_size // tp) * hidden
    inner = 3 * moe.moe_intermediate_size // parallel.expert_tp_size
    return shared, moe.num_experts // parallel.ep_size * inner * hidden


def _fp8_copies(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig, layers: list[int]
) -> int:
    """Return the bytes of weights that are kept in FP8 beside ``dtype`` while a step lasts: scaled
    along rows for forward and along columns for backward. They are all there is of weights that
    are kept in FP8 only, and take the room of bf16 then. The few vectors of a layer count too."""
    if trainer.fp8 is None or trainer.fp8_params:
        return 0
    end = model.num_hidden_layers - trainer.num_last_layers_bf16
    in_fp8 = [layer for layer in layers if trainer.num_first_layers_bf16 <= layer < end]
    return sum(_FP8_COPIES * sum(_layer_weights(model, parallel, layer)) for layer in in_fp8)


def _num_tokens(parallel: ParallelConfig, trainer: TrainerConfig) -> int:
    """Return the tokens of a microbatch that a rank computes."""
    return trainer.rows_per_microbatch * trainer.row_tokens // parallel.cp_size


def _activations(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig, stage: int, layers: int
) -> int:
    """``layers`` is the number of layers of the longest chunk."""
    saved = layers * _saved_in_a_layer(model, parallel, trainer.recompute)
    saved *= _num_waiting(parallel, stage)
    if stage == parallel.pp_size - 1:
        saved += -(-model.hidden_size // parallel.tp_size)  # of the last norm
        saved += model.hidden_size  # what the head multiplies, uncut
    return saved * _num_tokens(parallel, trainer) * _BYTES[trainer.dtype]


def _workspace(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig, stage: int
) -> int:
    element, num_tokens = _BYTES[trainer.dtype], _num_tokens(parallel, trainer)
    again = _saved_in_a_layer(model, parallel, "none")
    again -= _saved_in_a_layer(model, parallel, trainer.recompute)
    layer = again * num_tokens * element
    if stage < parallel.pp_size - 1:
        return layer
    width = slice_width(
        num_tokens, parallel.padded_vocab_size(model.vocab_size) // parallel.tp_size
    )
    # Logits and their exponentials in fp32, and as computed.
    return max(layer, width * num_tokens * (8 if element == 4 else element + 8))


def _num_waiting(parallel: ParallelConfig, stage: int) -> int:
    """Return how many chunks, over all microbatches, wait for their backward on ``stage``."""
    behind = parallel.pp_size - stage - 1
    if parallel.vpp_size == 1:
        return behind + 1
    return 2 * behind + (parallel.vpp_size - 1) * parallel.pp_size + 1


def _saved_in_a_layer(
    model: ModelConfig, parallel: ParallelConfig, recompute: Literal["none", "selective", "full"]
) -> int:
    """Return the elements saved for each token: inputs of norms and products, and of attention."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    if recompute == "full":
        return -(-model.hidden_size // parallel.tp_size)
    # Two norms: input and output, cut over the ranks by sequence parallelism.
    hidden = 4 * model.hidden_size
    # The fused product; queries in one piece for their norm; what attention takes and returns.
    attention = 4 * queries + 3 * keys
    if parallel.cp_size > 1 and recompute == "none":
        # Instead of this rank's keys, the keys and values of all.
        attention += (2 * parallel.cp_size - 1) * keys
    # Gate and up, and the steps of the activation up to the input of the last product.
    mlp = 5 * _active_width(model, model.moe)
    if recompute == "selective" and model.moe is None:
        mlp = 0
    return -(-(hidden + attention + mlp) // parallel.tp_size)


def _active_width(model: ModelConfig, moe: MoeConfig | None) -> int:
    if moe is None:
        return model.intermediate_size
    routed = moe.num_experts_per_tok * moe.moe_intermediate_size
    return max(model.intermediate_size * (moe.num_dense_layers > 0), routed) + (
        moe.shared_intermediate_size
    )
