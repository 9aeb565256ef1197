"""What torch and Megatron-core warn people about and only their authors can change."""

from __future__ import annotations

import warnings

from npr_megatron.runtime.device import device_type

_ABOUT_THEMSELVES = (
    r"full scope is deprecated",
    r"MLP requires ffn_hidden_size",
    r"Warning: tp_group is None",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # of experts
    r"When using sequence parallelism it is recommended",
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",  # the optimizer's shards are views
    r"`load_state_dict` is deprecated",
    r"Please use DTensor instead",
    r"If you are using transformer_engine as the transformer implementation",  # recompute
)
_ABOUT_GPU_LIBRARIES = (r"Transformer Engine and Apex are not installed", r"Apex is not installed")


def silence_foreign_warnings() -> None:
    """Keep the terminal of a trainer rank for what its user can act on; for this process.

    Call it before Megatron is imported. Missing GPU libraries are told where there is a GPU.
    """
    gpu_libraries = _ABOUT_GPU_LIBRARIES if device_type() == "cpu" else ()
    for message in (*_ABOUT_THEMSELVES, *gpu_libraries):
        warnings.filterwarnings("ignore", message=message)
