"""Branch attention by segments: exact, without a mask, in memory that grows with the tokens.

``topology.attention_plan`` says which stretch of a row looks at which; each of these parts is one
flash attention call without a mask. A token's parts (its own run, what came before the run) are
merged by their log-sum-exps: attention over a union of keys is the mean of the attentions over its
parts, weighted by their sums of exponentials. Backward runs part by part too, each with the merged
output and the merged log-sum-exp, which turn a part's scores into probabilities over all keys; so
its gradients are those of the whole (as in ring attention) and no part keeps anything.

Query heads that share a key head are not given copies of it. Padding gets zeros and no gradient,
where a mask lets it see itself; nothing looks at it either way.

The CUDA calls could not be executed where this was written: run ``pytest -m gpu`` before relying on
them. They take bf16 and fp16 only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npr_megatron.topology.attention_plan import AttentionPlan, Part

_PAIR_CELLS = 1.5
"""What a pair costs, in cells of a mask: squares are computed in blocks, beyond their diagonal."""
_PART_PRODUCTS = 2**19
"""What a part costs besides its pairs, in cells times channels: about 0.12 ms for both passes."""


def segments_pay(plan: AttentionPlan, num_cells: int, width: int) -> bool:
    """Return whether a CPU computes ``plan`` faster than attention under a mask of ``num_cells``.

    Both costs were fitted to forward and backward of one thread, fp32. Twelve samples of 60 to 120
    tokens in four rows, 128 channels: even; the same with 512 channels: 1.6 times as fast as the
    mask; one sample of 512 or 2,000 tokens: 1.4 and 2.4 times; twelve of 100 to 200 tokens in one
    row: 7 times.

    Args:
        width: channels of all query heads.
    """
    cost = _PAIR_CELLS * plan.num_pairs * width + plan.num_parts * _PART_PRODUCTS
    return cost < num_cells * width


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Return [B, N, S, D]: what each query of this rank sees, attended to.

    Args:
        query: [B, N, S, D], the tokens of this rank.
        key: [B, K, L, D], of whole rows, in their order; K divides N.
        value: [B, K, L, D].
        plan: of these rows and this rank.
        scale: of the scores.
    """
    return _SegmentAttention.apply(query, key, value, plan, scale)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        out, lse = _attend(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        # Sums over parts are taken in fp32: each part's share is rounded once.
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        of_queries = _rows(grad_out, out, lse, query, grads[0])
        of_keys = _rows(key, value, grads[1], grads[2])
        plan: AttentionPlan = ctx.plan
        for is_causal, parts in ((True, plan.own), (False, plan.earlier)):
            for part in parts:
                *looking, grad_query = _queries(part, of_queries)
                keys, values, grad_key, grad_value = _keys(part, of_keys)
                shares = _flash_backward(
                    *looking, key=keys, value=values, is_causal=is_causal, scale=ctx.scale
                )
                for grad, share in zip((grad_query, grad_key, grad_value), shares, strict=True):
                    grad += share
        dtype = query.dtype
        return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype), None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, S, D] and the log-sum-exp [B, N, S] of each query's scores."""
    rows, heads, length, head_dim = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    # Laid out as Megatron goes on with it.
    out = query.new_zeros((length, rows, heads, head_dim), dtype=exact).permute(1, 2, 0, 3)
    lse = query.new_zeros((rows, heads, length), dtype=exact)
    of_queries, of_keys = _rows(query, out, lse), _rows(key, value)
    for part in plan.own:
        looking, part_out, part_lse = _queries(part, of_queries)
        keys = _keys(part, of_keys)
        found_out, found_lse = _flash(looking, *keys, is_causal=True, scale=scale)
        part_out.copy_(found_out)
        part_lse.copy_(found_lse)
    for part in plan.earlier:
        looking, part_out, part_lse = _queries(part, of_queries)
        keys = _keys(part, of_keys)
        more = _flash(looking, *keys, is_causal=False, scale=scale)
        _merge(part_out, part_lse, *more)
    return out.to(query.dtype), lse


def _rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the tensors of each row, one row long: parts are cut out of them in one step each."""
    return list(zip(*(tensor.split(1) for tensor in tensors), strict=True))


def _queries(part: Part, rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the queries of ``part`` out of [1, N, S, ...]."""
    return [x.narrow(2, part.first_query, part.num_queries) for x in rows[part.row]]


def _keys(part: Part, rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the keys of ``part`` out of [1, K, L, D]."""
    return [x.narrow(2, part.first_key, part.num_keys) for x in rows[part.row]]


def _merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Let ``out`` and ``lse``, changed in place, stand for the keys of both parts."""
    weight = torch.sigmoid(more_lse - lse)
    out.lerp_(more_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, more_lse))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return one part's output and log-sum-exp."""
    aten: Any = torch.ops.aten
    if query.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return out, lse
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )


def _flash_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one part adds to the gradients of its query, key and value.

    Args:
        out: merged over all parts of these queries, as ``lse`` is.
    """
    aten: Any = torch.ops.aten
    if query.is_cuda:
        no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse.contiguous(),  # its stride over heads is taken for granted
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            is_causal,
            no_dropout,
            no_dropout,
            scale=scale,
        )
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, is_causal, scale=scale
    )
