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

_CALL_PRODUCTS = 2**24
"""What one more call costs, in products of a query's and a key's channel computed meanwhile."""


def segments_pay(plan: AttentionPlan, num_cells: int, width: int) -> bool:
    """Return whether a CPU computes ``plan`` faster than attention under a mask of ``num_cells``.

    Args:
        width: channels of all query heads.
    """
    return plan.num_pairs * width + plan.num_parts * _CALL_PRODUCTS < num_cells * width


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
        plan: AttentionPlan = ctx.plan
        for is_causal, parts in ((True, plan.own), (False, plan.earlier)):
            for part in parts:
                queries, keys = _places(part)
                shares = _flash_backward(
                    grad_out[queries],
                    (query[queries], key[keys], value[keys]),
                    out[queries],
                    lse[queries],
                    is_causal,
                    ctx.scale,
                )
                for grad, at, share in zip(grads, (queries, keys, keys), shares, strict=True):
                    grad[at] += share
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
    for part in plan.own:
        queries, keys = _places(part)
        out[queries], lse[queries] = _flash(query[queries], key[keys], value[keys], True, scale)
    for part in plan.earlier:
        queries, keys = _places(part)
        more_out, more_lse = _flash(query[queries], key[keys], value[keys], False, scale)
        _merge(out[queries], lse[queries], more_out, more_lse)
    return out.to(query.dtype), lse


def _merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Let ``out`` and ``lse``, changed in place, stand for the keys of both parts."""
    weight = torch.sigmoid(more_lse - lse)
    out.lerp_(more_out.to(out.dtype), weight[..., None])
    lse.copy_(torch.logaddexp(lse, more_lse))


def _places(part: Part) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where the queries and the keys of ``part`` lie in [B, heads, tokens, ...]."""
    row, every_head = slice(part.row, part.row + 1), slice(None)
    return (row, every_head, part.queries), (row, every_head, part.keys)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
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
    heads: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one part adds to the gradients of its query, key and value ``heads``.

    Args:
        out: merged over all parts of these queries, as ``lse`` is.
    """
    aten: Any = torch.ops.aten
    if grad_out.is_cuda:
        no_dropout = torch.zeros((), dtype=torch.int64, device=grad_out.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out,
            *heads,
            out,
            lse.contiguous(),  # its stride over heads is taken for granted
            None,
            None,
            heads[0].shape[2],
            heads[1].shape[2],
            0.0,
            is_causal,
            no_dropout,
            no_dropout,
            scale=scale,
        )
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, *heads, out, lse, 0.0, is_causal, scale=scale
    )
