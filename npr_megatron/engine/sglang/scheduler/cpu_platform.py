"""SGLang on a CPU in plain torch.

The platform that SGLang itself has for CPUs imports compiled operators that no package index
carries; this one needs torch only. SGLang finds :func:`activate` by its entry point
``sglang.srt.platforms`` in every process it starts; nothing of this package imports this module.
Where CUDA is present SGLang keeps its own platform.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin  # pyright: ignore[reportMissingImports]
from sglang.srt.platforms.device_mixin import PlatformEnum  # pyright: ignore[reportMissingImports]
from sglang.srt.platforms.interface import (  # pyright: ignore[reportMissingImports]
    PlatformCapabilities,
    SRTPlatform,
)


def activate() -> str | None:
    """Return the qualified name of the platform to use, or None where CUDA is present."""
    if torch.cuda.is_available():
        return None
    return f"{__name__}:{TorchCpuPlatform.__name__}"


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU that has torch and nothing else: no Triton, no graphs, no compiled kernels."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: object = None) -> bool:
        """Pinned memory serves copies to a device; there is none."""
        return False

    def get_default_attention_backend(self) -> str:
        """Return the backend that calls ``scaled_dot_product_attention`` per request."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Return the method of SGLang's layers that is written in torch."""
        return "native"
