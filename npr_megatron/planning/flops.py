"""Floating-point operations of training, counted: what a step must compute at least.

Matrix products only (multiply and add are two); recomputation, norms and softmax are left out, as
the field counts MFU. Attention counts the pairs of tokens that see one another, so branches that
are blind to each other cost nothing and a packed row costs what its samples do.
"""

from __future__ import annotations

from npr_megatron.config.model import ModelConfig

_TRAINING = 3
"""A backward pass computes two products for each of the forward pass."""

PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0,
    "B100": 1750.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
}
"""Dense bf16 peak by what the driver's name of a device contains [TFLOP/s]; special names first.
Source: NVIDIA's data sheets, without sparsity."""


def matmul_parameters(model: ModelConfig) -> int:
    """Return the weights that every token is multiplied with: all matrices but the embedding."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    attention = model.hidden_size * model.head_dim * (2 * heads + 2 * kv_heads)
    mlps = 0
    for layer in range(model.num_hidden_layers):
        width, experts = model.intermediate_size, 0
        if model.moe is not None and layer >= model.moe.num_dense_layers:
            moe = model.moe
            width = moe.num_experts_per_tok * moe.moe_intermediate_size
            width += moe.shared_intermediate_size
            experts = moe.num_experts
        mlps += model.hidden_size * (3 * width + experts)
    head = model.vocab_size * model.hidden_size
    return model.num_hidden_layers * attention + mlps + head


def training_flops(model: ModelConfig, num_tokens: int, num_pairs: int) -> int:
    """Return the operations of one forward and backward pass.

    Args:
        num_tokens: tokens that are not padding.
        num_pairs: (query, key) pairs that see one another (``topology.pairs``).
    """
    products = 2 * matmul_parameters(model) * num_tokens
    width = model.num_attention_heads * model.head_dim
    attention = 2 * 2 * width * num_pairs * model.num_hidden_layers
    return _TRAINING * (products + attention)


def peak_tflops(device: str) -> float | None:
    """Return the peak of a device by its driver's name; None where it is not known."""
    known = (peak for part, peak in PEAK_TFLOPS.items() if _names(part, device))
    return next(known, None)


def _names(part: str, device: str) -> bool:
    words = device.replace("-", " ").split()
    return all(word in words for word in part.split())
