"""What distinguishes the families of HF: what each has words for, and which can be trained. Pure.

A sentence has three parts: what is asked, what stands against it, what to change.
"""

from __future__ import annotations

from collections.abc import Iterator

from npr_megatron.config.model import ModelConfig, MoeConfig

TRAINABLE_FAMILIES = ("qwen3", "qwen3_moe", "llama")
"""Those that training and decoding compute; weights of the others can be moved and converted."""


def family_problems(model: ModelConfig) -> list[str]:
    """Return one sentence per setting that no model of the family has."""
    family, moe = model.family, model.moe
    is_moe_family = family in ("qwen3_moe", "glm4_moe")
    rules = [
        (is_moe_family and moe is None, "has routed experts and moe is not set; describe them"),
        (not is_moe_family and moe is not None, "is dense and moe is set; remove it"),
        (
            family in ("qwen3", "qwen3_moe") and not model.has_qk_norm,
            "normalises queries and keys and has_qk_norm is false; set it",
        ),
        (family == "llama" and model.has_qk_norm, "has no query and key norms; unset has_qk_norm"),
    ]
    if moe is not None:
        rules += _expert_rules(family, moe)
    return [f"family {family} {sentence}" for is_broken, sentence in rules if is_broken]


def _expert_rules(family: str, moe: MoeConfig) -> list[tuple[bool, str]]:
    shared, inner = moe.shared_intermediate_size, moe.moe_intermediate_size
    return [
        (
            moe.num_experts_per_tok > moe.num_experts,
            f"has {moe.num_experts} experts and num_experts_per_tok is {moe.num_experts_per_tok}; "
            "lower it",
        ),
        (
            family == "qwen3_moe" and (shared > 0 or moe.has_expert_bias),
            "has neither shared experts nor an expert bias; remove them",
        ),
        (
            family == "glm4_moe" and not moe.has_expert_bias,
            "has an expert bias; set has_expert_bias",
        ),
        (
            family == "glm4_moe" and (shared == 0 or shared % inner > 0),
            f"counts its shared experts and shared_intermediate_size {shared} is no positive "
            f"multiple of moe_intermediate_size {inner}; change it",
        ),
    ]


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Yield what keeps ``model`` from being trained: weights of more models can be laid out."""
    if model.family not in TRAINABLE_FAMILIES:
        yield (
            f"model.architecture.family is {model.family} and training computes "
            f"{', '.join(TRAINABLE_FAMILIES)} only; use one of them"
        )
    for problem in family_problems(model):
        yield f"model.architecture: {problem}"
    if model.moe is not None and model.moe.num_experts_per_tok == 1:
        yield (
            "model.architecture.moe.num_experts_per_tok is 1 and its weights are normalised to "
            "one, so that a router of one expert would never learn; use two experts or more"
        )
    if model.head_dim % 2:
        yield f"head_dim {model.head_dim} is odd and rotary positions turn pairs; make it even"
