"""Parameters kept in FP8 on a CPU: what TransformerEngine's do, as far as Megatron and we can see.

A tensor that poses as bf16 and holds e4m3 codes with one scale for each block: reading it gives
dequantised copies, copying into it quantises. Megatron's hooks for such tensors are answered here,
so that its own buffers, gathers and optimizer run with them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from npr_megatron.weights.quantise import QUANTISED, dequantise, quantise

BLOCK = 16
QUANTISED_WEIGHTS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class BlockQuantised(Tensor):
    """A matrix in blocks; see the module."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    codes: Tensor
    """[M, K] uint8; Megatron moves it into the buffer that replicas gather."""
    scales: Tensor
    transposed: Tensor
    """[K, M] uint8, for backward: made from the codes when they have been gathered."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, transposed: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)
        made.codes, made.scales, made.transposed = codes, scales, transposed
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        codes, scales = quantise(weight, BLOCK, "power_of_two")
        return cls(codes.view(torch.uint8), scales, codes.view(torch.uint8).t().clone())

    def dequantize(self) -> Tensor:
        """The numbers that are meant."""
        return dequantise(self.codes.view(QUANTISED), self.scales, BLOCK).bfloat16()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten: Any = torch.ops.aten
        if func is aten.detach.default:
            return cls(args[0].codes, args[0].scales, args[0].transposed)
        if func is aten.copy_.default and isinstance(args[0], cls):
            made = cls.of(args[1].bfloat16())
            args[0].codes.copy_(made.codes)
            args[0].scales.copy_(made.scales)
            args[0].transposed.copy_(made.transposed)
            return args[0]
        plain = tree_map(
            lambda a: a.dequantize() if isinstance(a, cls) else a, (args, kwargs or {})
        )
        return func(*plain[0], **plain[1])


def keep_weights_in_fp8() -> None:
    """Build linear layers with such weights in this process, and answer Megatron's hooks."""
    import megatron.core.utils as megatron_utils
    from megatron.core import fp8_utils
    from packaging.version import Version

    from npr_megatron.model import build
    from npr_megatron.train import rank

    megatron_utils._te_version = Version("2.9.0")  # of such tensors; asked before reading them
    utils: Any = fp8_utils
    utils.HAVE_TE_FP8_TENSOR_CLASS, utils.FP8_TENSOR_CLASS = True, BlockQuantised
    utils._modify_underlying_storage_impl = _move_codes
    utils._quantize_param_shard_impl = _quantise_shards
    utils.te_post_all_gather_processing = _transpose
    original = build._build_chunk

    def build_chunk(*args: Any) -> Any:
        chunk = original(*args)
        for name, module in chunk.named_modules():
            if name.rpartition(".")[2] in QUANTISED_WEIGHTS:
                # Not what will be loaded: whoever starts from it starts from something else.
                made: Any = torch.nn.Parameter(BlockQuantised.of(torch.ones(module.weight.shape)))
                made.__dict__.update(module.weight.__dict__)
                module.weight = made
        return chunk

    build._build_chunk = build_chunk
    _gather_one_by_one()
    rank.require_fp8 = lambda recipe: None  # there is no GPU, and none is needed here


def _gather_one_by_one() -> None:
    """FP8 and bf16 weights are gathered as one call, whose tensors gloo takes to be of one type."""
    from megatron.core.distributed import param_and_grad_buffer

    buffers: Any = param_and_grad_buffer

    def at_once(collective: Any) -> Any:
        return lambda *tensors, async_op, **options: collective(*tensors, **options)

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, at_once(getattr(buffers, name)))
    buffers._coalescing_manager = lambda *_, **__: _Done()


class _Done(AbstractContextManager["_Done"]):
    """Calls that were over when they returned."""

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        """Nothing is under way."""


def _move_codes(parameter: BlockQuantised, buffer: Tensor) -> None:
    buffer.copy_(parameter.codes)
    parameter.codes = buffer


def _transpose(parameters: list[BlockQuantised]) -> None:
    for parameter in parameters:
        parameter.transposed.copy_(parameter.codes.t())


def _quantise_shards(
    parameters: list[BlockQuantised],
    shards: list[Tensor | None],
    starts: list[int | None],
    group: dist.ProcessGroup,
    _: None,
) -> None:
    """Quantise this replica's shard of each parameter with the scales of the whole one."""
    for parameter, shard, start in zip(parameters, shards, starts, strict=True):
        whole = torch.zeros(parameter.codes.numel())
        if shard is not None and start is not None:
            whole[start : start + shard.numel()] = shard
        dist.all_reduce(whole, group=group)
        made = BlockQuantised.of(whole.view(parameter.codes.shape).bfloat16())
        parameter.scales.copy_(made.scales)
        if shard is not None and start is not None:
            own = slice(start, start + shard.numel())
            parameter.codes.view(-1)[own] = made.codes.view(-1)[own]
