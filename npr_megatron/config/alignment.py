"""What rows of tokens and sides of matrix products must be multiples of: pure.

Packing pads to it and the checkers ask for it; nobody else knows these numbers.
"""

from __future__ import annotations

import math

from npr_megatron.config.training import ParallelConfig, TrainerConfig

ROW_MULTIPLE = 16
"""Rows are padded to a multiple of this many tokens at least: attention kernels like it."""
_FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def fp8_multiple(trainer: TrainerConfig) -> int:
    """Return what each side of a matrix product must be a multiple of, on every rank; 1 without
    FP8."""
    return 1 if trainer.fp8 is None else _FP8_MULTIPLES[trainer.fp8]


def row_multiple(parallel: ParallelConfig, trainer: TrainerConfig) -> int:
    """Return what the length of a packed row is padded to a multiple of [tokens].

    Then rows divide into the slices of context and sequence parallelism, and in FP8 the tokens
    that a rank multiplies of each row are a multiple of what the recipe wants.

    Example:
        tp_size 2 and cp_size 2 give 16; with mxfp8 128.
    """
    ranks = parallel.tp_size * parallel.cp_size
    return math.lcm(ROW_MULTIPLE, parallel.row_slices, fp8_multiple(trainer) * ranks)
