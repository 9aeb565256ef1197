"""Calls to SGLang besides stages and weights: coroutines beside its ``TokenizerManager``.

The module is imported by the engine's owner, too, who names them (``Server.call``) and has no
SGLang.
"""

from __future__ import annotations

from typing import Any


async def pause(manager: Any) -> None:
    """Stop where every request is, between two forward passes."""
    from sglang.srt.managers.io_struct import (  # pyright: ignore[reportMissingImports]
        PauseGenerationReqInput,
    )

    await manager.pause_generation(PauseGenerationReqInput(mode="in_place"))


async def go_on(manager: Any) -> None:
    """Go on behind a pause."""
    from sglang.srt.managers.io_struct import (  # pyright: ignore[reportMissingImports]
        ContinueGenerationReqInput,
    )

    # Emptying CUDA's cache is for pauses that gave memory away, and an error without CUDA.
    await manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
