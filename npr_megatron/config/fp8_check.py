"""Every problem with training in FP8 as a run file asks for it: pure.

What Megatron would refuse is refused here in a sentence of its own, and so is what it would accept
and compute wrongly. Whether the machine has FP8 is the business of ``runtime.fused_kernels``.
"""

from __future__ import annotations

from collections.abc import Iterator

from npr_megatron.config.alignment import fp8_multiple
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig, TrainerConfig

_ONLY_WITH_FP8 = ("fp8_params", "num_first_layers_bf16", "num_last_layers_bf16")


def recipe_problems(parallel: ParallelConfig, trainer: TrainerConfig) -> Iterator[str]:
    """Yield what is wrong with the fields about FP8 whatever the model is."""
    if trainer.fp8 is None:
        set_fields = [f"trainer.{name}" for name in _ONLY_WITH_FP8 if getattr(trainer, name)]
        if set_fields:
            yield (
                f"{', '.join(set_fields)}: set, and trainer.fp8 is not; name a recipe in "
                "trainer.fp8, or remove the rest"
            )
        return
    if trainer.dtype != "bf16":
        yield (
            f'trainer.fp8 is "{trainer.fp8}" and trainer.dtype is "{trainer.dtype}"; FP8 scales '
            'bf16, set dtype = "bf16"'
        )
    if trainer.fp8 == "delayed" and _num_layers_bf16(trainer):
        yield (
            f"{_layers_bf16(trainer)} leave layers in bf16 and delayed scaling spans all layers of "
            'a pass; set both to 0, or trainer.fp8 = "tensorwise"'
        )
    if trainer.fp8 == "delayed" and trainer.fp8_params:
        yield (
            "trainer.fp8_params with delayed scaling would round weights that were just loaded by "
            'no scale at all, which it learns from passes; set trainer.fp8 = "tensorwise", or '
            "remove fp8_params"
        )
    if trainer.fp8 == "mxfp8" and trainer.fp8_params and parallel.overlap_data_parallel:
        yield (
            "trainer.fp8_params with mxfp8 gathers new weights in the room of the gradients, and "
            "under parallel.overlap_data_parallel they would be there only until the next forward: "
            "nothing could be published; remove one of the two"
        )


def shape_problems(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig
) -> Iterator[str]:
    """Yield what keeps ``model``, cut as ``parallel`` says, from being multiplied in FP8."""
    if trainer.fp8 is None:
        return
    yield from _layers(model, parallel, trainer)
    multiple = fp8_multiple(trainer)
    for what, size, over in _product_sides(model, parallel):
        if size % (over * multiple):
            share = "" if over == 1 else f" over {over} ranks"
            yield (
                f"{what} is {size}{share}, and {trainer.fp8} FP8 multiplies matrices whose sides "
                f"are multiples of {multiple}; make it a multiple of {over * multiple}, or cut it "
                "over fewer ranks"
            )


def _layers(model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig) -> Iterator[str]:
    """Megatron takes an equal share of the layers for a stage, however they are split."""
    of_a_stage = model.num_hidden_layers // parallel.pp_size
    most = max(trainer.num_first_layers_bf16, trainer.num_last_layers_bf16)
    if most > of_a_stage:
        yield (
            f"{_layers_bf16(trainer)} are counted within one stage, and the "
            f"{model.num_hidden_layers} layers over parallel.pp_size {parallel.pp_size} make "
            f"{of_a_stage} for each; set neither above {of_a_stage}"
        )
    elif _num_layers_bf16(trainer) >= model.num_hidden_layers:
        yield (
            f"{_layers_bf16(trainer)} leave none of the {model.num_hidden_layers} layers to FP8; "
            "lower them, or remove trainer.fp8"
        )


def _num_layers_bf16(trainer: TrainerConfig) -> int:
    return trainer.num_first_layers_bf16 + trainer.num_last_layers_bf16


def _layers_bf16(trainer: TrainerConfig) -> str:
    return (
        f"trainer.num_first_layers_bf16 {trainer.num_first_layers_bf16} and num_last_layers_bf16 "
        f"{trainer.num_last_layers_bf16}"
    )


def _product_sides(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield what each side of a matrix product is, its size, and over how many ranks it is cut.

    Tokens are the third side: ``config.alignment`` pads them.
    """
    tp, heads, kv_heads = parallel.tp_size, model.num_attention_heads, model.num_key_value_heads
    yield "hidden_size", model.hidden_size, 1
    qkv_rows = (heads + 2 * kv_heads) * model.head_dim
    yield "(num_attention_heads + 2 * num_key_value_heads) * head_dim", qkv_rows, tp
    yield "num_attention_heads * head_dim", heads * model.head_dim, tp
    moe = model.moe
    if moe is None or moe.num_dense_layers:
        yield "intermediate_size", model.intermediate_size, tp
    if moe is not None:
        yield "moe_intermediate_size", moe.moe_intermediate_size, parallel.expert_tp_size
        yield "shared_intermediate_size", moe.shared_intermediate_size, tp
