"""What an optimizer and where it keeps its state do not go together with: pure."""

from __future__ import annotations

from collections.abc import Iterator

from npr_megatron.config.training import ParallelConfig, TrainerConfig


def optimizer_problems(parallel: ParallelConfig, trainer: TrainerConfig) -> Iterator[str]:
    """Yield a sentence for everything that Megatron refuses or, worse, does not."""
    frac = trainer.optimizer_offload_frac
    if frac and trainer.dtype != "bf16":
        yield (
            f'trainer.optimizer_offload_frac is {frac:g} and trainer.dtype is "{trainer.dtype}"; '
            'Megatron offloads fp32 copies of bf16 weights only, set dtype = "bf16" or remove it'
        )
    if frac and trainer.fp8_params:
        yield (
            f"trainer.optimizer_offload_frac is {frac:g} and trainer.fp8_params is set; the CPU's "
            "part of the optimizer cannot write FP8 weights, remove one of the two"
        )
    if trainer.optimizer != "muon":
        return
    for field, is_set, why in (
        (
            "trainer.optimizer_offload_frac",
            trainer.optimizer_offload_frac > 0,
            "only AdamW's state can be offloaded",
        ),
        (
            "trainer.fp8_params",
            trainer.fp8_params,
            "FP8 weights are written by the distributed optimizer, which Muon cannot use",
        ),
        (
            "parallel.overlap_data_parallel",
            parallel.overlap_data_parallel,
            "weights are gathered by the distributed optimizer, which Muon cannot use",
        ),
    ):
        if is_set:
            yield f'trainer.optimizer is "muon" and {field} is set; {why}, remove one of the two'
