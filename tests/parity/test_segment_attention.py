"""Attention by segments is attention under the dense mask, and a leak or a loss in it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npr_megatron.model import segment_attention as segments
from npr_megatron.topology.attention_plan import AttentionPlan, attention_plan
from npr_megatron.topology.context_slices import own_columns, own_slices
from npr_megatron.topology.visibility import dense_mask
from tests.packed_rows import Labels, packed_rows, sample_labels
from tests.structures import QUICK

QUERY_HEADS, KEY_HEADS, HEAD_DIM, SCALE = 4, 2, 8, 0.3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_heads(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key, value [B, heads, S, D] and what the output is multiplied with."""
    generator = torch.Generator().manual_seed(length)
    counts = (QUERY_HEADS, KEY_HEADS, KEY_HEADS, QUERY_HEADS)
    # Laid out as Megatron hands them over.
    shapes = [(length, rows, count, HEAD_DIM) for count in counts]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(2 * heads).to(dtype).permute(1, 2, 0, 3) for heads in drawn]


def under_mask(mask: Tensor) -> Attend:
    """Softmax attention spelt out; keys are copied for every query head that shares them."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = QUERY_HEADS // KEY_HEADS
        key, value = (heads.repeat_interleave(group, 1) for heads in (key, value))
        scores = (query @ key.mT * SCALE).masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1) @ value

    return attend


def by_segments(plan: AttentionPlan) -> Attend:
    return partial(segments.segment_attention, plan=plan, scale=SCALE)


def measured(attend: Attend, heads: list[Tensor], columns: Tensor, used: Tensor) -> list[Tensor]:
    """Return output of the queries at ``columns`` and gradients, padding left out by ``used``."""
    inputs = [tensor.detach().requires_grad_() for tensor in heads[:3]]
    output = attend(inputs[0][:, :, columns], *inputs[1:])
    weights = heads[3][:, :, columns] * used[:, None, columns, None]
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    return [(output * used[:, None, columns, None]).detach(), *gradients]


def compare(labels: Labels, dtype: torch.dtype, cp_size: int = 1, change=None) -> None:
    """Require that all ranks together compute what the mask says.

    Args:
        change: turns the plan of a rank into the one that it attends by.
    """
    rows, length = labels[0].shape
    heads = random_heads(rows, length, dtype)
    used = torch.from_numpy(labels[0] >= 0)
    everything = torch.arange(length)
    mask = torch.from_numpy(dense_mask(*labels))
    oracle = [heads_.double() for heads_ in heads]
    output, *gradients = measured(under_mask(mask), oracle, everything, used)
    sums = [torch.zeros_like(gradient) for gradient in gradients]
    for rank in range(cp_size):
        plan = attention_plan(*labels, own_slices(length, rank, cp_size))
        columns = torch.from_numpy(own_columns(length, rank, cp_size))
        attend = by_segments(change(plan) if change else plan)
        own, *shares = measured(attend, heads, columns, used)
        check("output", own, output[:, :, columns])
        for total, share in zip(sums, shares, strict=True):
            total += share
    for name, total, gradient in zip(("query", "key", "value"), sums, gradients, strict=True):
        check(f"gradient of {name}", total.to(dtype), gradient)


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Require equality but for rounding, relative to the largest element where that is above 1."""
    scale = expected.abs().max().clamp_min(1.0)
    error = float((found.double() - expected).abs().max() / scale)
    assert error <= TOLERANCE[found.dtype], f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_segments_equal_the_mask_in_output_and_gradients(dtype):
    @QUICK
    @given(packed_rows(), st.sampled_from([1, 2, 4]))
    def all_rows(labels, cp_size):
        compare(labels, dtype, cp_size)

    all_rows()


def two_samples(tokens: int = 3) -> Labels:
    """A row of two samples with two blocks each, and padding."""
    samples = [
        sample_labels(tokens, [(2, [tokens, 2, 4]), (1, [3, tokens])], 2),
        sample_labels(4, [(0, [2, 3]), (tokens, [1, 2, 3])], tokens),
    ]
    lengths = [len(block) for block, _ in samples]
    padding = -sum(lengths) % 16
    segment = np.repeat([0, 1, -1], [*lengths, padding]).astype(np.int32)
    block, branch = (
        np.array([*samples[0][i], *samples[1][i], *[0] * padding], np.int32) for i in range(2)
    )
    return segment[None], block[None], branch[None]


def test_long_runs_are_merged_as_exactly_as_short_ones():
    compare(two_samples(300), torch.float32)
    compare(two_samples(300), torch.float64, cp_size=2)


def siblings_are_visible(labels: Labels, plan: AttentionPlan) -> AttentionPlan:
    segment, block, branch = labels
    return attention_plan(segment, block, np.minimum(branch, 1), ((0, segment.shape[1]),))


def samples_of_a_row_are_visible(labels: Labels, plan: AttentionPlan) -> AttentionPlan:
    segment, block, branch = labels
    return attention_plan(np.minimum(segment, 0), block, branch, ((0, segment.shape[1]),))


def what_came_earlier_is_lost(labels: Labels, plan: AttentionPlan) -> AttentionPlan:
    return replace(plan, earlier=())


def a_rectangle_is_lost(labels: Labels, plan: AttentionPlan) -> AttentionPlan:
    return replace(plan, earlier=plan.earlier[:-1])


@pytest.mark.parametrize(
    "leak",
    [
        siblings_are_visible,
        samples_of_a_row_are_visible,
        what_came_earlier_is_lost,
        a_rectangle_is_lost,
    ],
)
def test_a_planted_leak_or_loss_shows(leak):
    labels = two_samples()
    with pytest.raises(AssertionError, match="is off by"):
        compare(labels, torch.float32, change=partial(leak, labels))


def test_a_backward_with_the_log_sum_exp_of_one_part_shows(monkeypatch):
    merge = segments._merge

    def merge_output_only(out, lse, more_out, more_lse):
        merge(out, lse.clone(), more_out, more_lse)

    monkeypatch.setattr(segments, "_merge", merge_output_only)
    with pytest.raises(AssertionError, match="is off by"):
        compare(two_samples(), torch.float32)


def test_half_precision_is_rounded_once():
    labels = two_samples(40)
    rows, length = labels[0].shape
    columns, used = torch.arange(length), torch.from_numpy(labels[0] >= 0)
    heads = random_heads(rows, length, torch.bfloat16)
    exact = [tensor.double() for tensor in heads]
    mask = torch.from_numpy(dense_mask(*labels))
    expected = measured(under_mask(mask), exact, columns, used)
    plan = attention_plan(*labels, ((0, length),))
    for found, want in zip(
        measured(by_segments(plan), heads, columns, used), expected, strict=True
    ):
        assert found.dtype == torch.bfloat16
        error = (found.double() - want).norm() / want.norm()
        assert error < 2**-7


def test_nothing_of_the_size_of_a_mask_is_kept_for_backward():
    labels = two_samples(300)
    length = labels[0].shape[1]
    heads = [tensor.requires_grad_() for tensor in random_heads(1, length, torch.float32)[:3]]
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        by_segments(attention_plan(*labels, ((0, length),)))(*heads)
    channels = HEAD_DIM * (2 * QUERY_HEADS + 2 * KEY_HEADS) + QUERY_HEADS
    assert sum(kept) == length * channels < length * length / 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [3, 300])
def test_segments_on_cuda_equal_the_mask_in_output_and_gradients(tokens):
    labels = two_samples(tokens)
    rows, length = labels[0].shape
    device = torch.device("cuda")
    columns = torch.arange(length, device=device)
    used = torch.from_numpy(labels[0] >= 0).to(device)
    heads = [tensor.to(device) for tensor in random_heads(rows, length, torch.bfloat16)]
    mask = torch.from_numpy(dense_mask(*labels)).to(device)
    exact = [tensor.double() for tensor in heads]
    expected = measured(under_mask(mask), exact, columns, used)
    plan = attention_plan(*labels, ((0, length),))
    for found, want in zip(
        measured(by_segments(plan), heads, columns, used), expected, strict=True
    ):
        assert (found.double() - want).norm() / want.norm() < 2**-6
