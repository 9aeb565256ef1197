"""How fast each plane of a head turns with the position: rotary embedding. Pure numpy."""

from __future__ import annotations

import numpy as np

from npr_megatron.config.model import ModelConfig, RopeScaling
from npr_megatron.records.trajectory import FloatArray


def inverse_frequencies(model: ModelConfig) -> FloatArray:
    """Return the angle [radians] per position of each plane (d, d + D/2) of a head: float32 [D/2].

    Computed in double precision and rounded once; transformers rounds after every operation, and
    differs in the last bits.
    """
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float64) / model.head_dim
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling is not None:
        frequencies *= _slowing(frequencies, model.rope_scaling)
    return frequencies.astype(np.float32)


def _slowing(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Return by what each frequency is multiplied: 1 / factor for planes that hardly turn within
    the first context, 1 for those that turn often, and linearly between the two.

    Source:
        Llama 3.1; ``_compute_llama3_parameters`` of transformers says the same in wavelengths.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept + (1 - kept) / scaling.factor
