"""What tests run beside SGLang's tokenizer manager, in the process in which it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from torch import Tensor


async def checksums(manager: Any) -> list[dict[str, str]]:
    """Return, per rank, SGLang's own checksum of each parameter."""
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    succeeded, message, ranks, _ = await manager.check_weights(CheckWeightsReqInput())
    assert succeeded, message
    return [rank["checksums"] for rank in ranks]


async def checksums_of(_manager: Any, ranks: list[Mapping[str, Tensor]]) -> list[dict[str, str]]:
    """Return the same checksums of given tensors."""
    from sglang.srt.utils.weight_checker import _hash_tensor

    return [{name: _hash_tensor(tensor) for name, tensor in rank.items()} for rank in ranks]


async def spans(manager: Any, token_ids: list[int], num_tokens: int) -> list[dict[str, Any]]:
    """Return the weight versions under which ``num_tokens`` were decoded behind ``token_ids``."""
    return (await _decoded(manager, token_ids, num_tokens))["weight_versions"]


async def begin(manager: Any, token_ids: list[int], num_tokens: int) -> None:
    """Begin to decode, and return when the first token is there."""
    has_begun = asyncio.Event()
    manager.npr_test = asyncio.ensure_future(_decoded(manager, token_ids, num_tokens, has_begun))
    await has_begun.wait()


async def end(manager: Any) -> list[dict[str, Any]]:
    """Return the weight versions of what was begun, when it has ended."""
    return (await manager.npr_test)["weight_versions"]


async def _decoded(
    manager: Any, token_ids: list[int], num_tokens: int, has_begun: asyncio.Event | None = None
) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(
        input_ids=token_ids,
        sampling_params={"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        stream=True,
    )
    meta: dict[str, Any] = {}
    async for out in manager.generate_request(request, None):
        meta = out["meta_info"]
        if has_begun is not None:
            has_begun.set()
    return meta
