"""Which sizes of a model must divide among ranks that cut it, whoever the ranks belong to."""

from __future__ import annotations

from collections.abc import Iterator

from npr_megatron.config.model import ModelConfig, MoeConfig


def kinds_of_layers(model: ModelConfig) -> tuple[MoeConfig | None, ...]:
    """Return what distinguishes the layers of ``model``: no experts, its experts, or both kinds."""
    if model.moe is None or model.moe.num_dense_layers >= model.num_hidden_layers:
        return (None,)
    return (None, model.moe) if model.moe.num_dense_layers else (model.moe,)


def attention_problems(model: ModelConfig, tp_size: int, asked_by: str) -> Iterator[str]:
    """Yield a sentence for all that keeps attention from being cut over ``tp_size`` ranks."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    yield from divides("num_attention_heads", heads, tp_size, asked_by)
    if heads % kv_heads:
        yield (
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
            "the model description is wrong"
        )
    if kv_heads % tp_size and tp_size % kv_heads:
        yield (
            f"num_key_value_heads {kv_heads} and {asked_by} {tp_size} do not divide each other; "
            "choose a tp_size that is a divisor or a multiple of the number of kv heads"
        )


def mlp_problems(
    model: ModelConfig, tp_size: int, expert_tp_size: int, asked_by: tuple[str, str]
) -> Iterator[str]:
    """Yield a sentence for each inner width that the ranks it is cut over do not divide."""
    dense, experts = asked_by
    for moe in kinds_of_layers(model):
        if moe is None:
            yield from divides("intermediate_size", model.intermediate_size, tp_size, dense)
            continue
        width, shared = moe.moe_intermediate_size, moe.shared_intermediate_size
        yield from divides("moe_intermediate_size", width, expert_tp_size, experts)
        yield from divides("shared_intermediate_size", shared, tp_size, dense)


def divides(name: str, value: int, size: int, asked_by: str) -> Iterator[str]:
    """Yield a sentence if ``value`` cannot be cut into ``size`` equal parts."""
    if value % size:
        yield f"{name} {value} is not a multiple of {asked_by} {size}; choose one that divides it"
