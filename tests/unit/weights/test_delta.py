"""Deltas: any change of any bits arrives, nothing else is touched, no other base is accepted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.errors import StaleWeightsError
from npr_megatron.weights import delta
from npr_megatron.weights.delta import apply_delta, encode_delta
from npr_megatron.weights.delta_chain import Baseline, Chain, DeltaHeader, ServedVersion
from npr_megatron.weights.plans.copies import Copy

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
V0, V1, V2 = (ServedVersion(number, 2**64 - 1 - number) for number in range(3))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.element_size()])


def random_bits(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern occurs, NaN payloads and negative zeros too."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def changed(tensor: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    other = random_bits(tensor.shape, tensor.dtype, seed + 1)
    return torch.where(
        torch.rand(tensor.shape, generator=generator) < fraction, bits(other), bits(tensor)
    ).view(tensor.dtype)


def copy_all(shape, **places) -> Copy:
    at = (0,) * len(shape)
    return Copy(0, "w", places.get("target", at), 0, "w", places.get("source", at), tuple(shape))


def stored(tensor: torch.Tensor):
    return {0: {"w": tensor}}


@st.composite
def transfers(draw: st.DrawFn):
    """A copy from a box of one storage to a box of another, either with leading axes or not."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    sides = []
    for _ in range(2):
        leading = draw(st.lists(st.integers(1, 3), max_size=1))
        margins = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in shape]
        start = [draw(st.integers(0, size - 1)) for size in leading]
        start += [before for before, _ in margins]
        size = [*leading, *(n + sum(m) for n, m in zip(shape, margins, strict=True))]
        sides.append((tuple(start), tuple(size)))
    (source, source_shape), (target, target_shape) = sides
    copy = copy_all(shape, source=source, target=target)
    return copy, source_shape, target_shape


@settings(max_examples=150, deadline=None)
@given(
    transfer=transfers(),
    dtype=st.sampled_from(DTYPES),
    fraction=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    chunk=st.sampled_from([1, 3, 16, 2**16]),
    seed=st.integers(0, 2**30),
)
def test_what_changed_arrives_and_nothing_else_is_touched(transfer, dtype, fraction, chunk, seed):
    copy, source_shape, target_shape = transfer
    base = random_bits(source_shape, dtype, seed)
    new = changed(base, fraction, seed)
    target = random_bits(target_shape, dtype, seed + 2)
    inside = target[copy.target_box.slices]
    inside.copy_(base[copy.source_box.slices].view(inside.shape))
    expected = target.clone()
    inside = expected[copy.target_box.slices]
    inside.copy_(new[copy.source_box.slices].view(inside.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "CHUNK_ELEMENTS", chunk)
        body = encode_delta([copy], stored(new), stored(base))
        for _ in range(2):  # a second time does no harm
            apply_delta(body, [copy], stored(target))
            assert torch.equal(bits(target), bits(expected))
        everything = encode_delta([copy], stored(new), None)
        target.zero_()
        apply_delta(everything, [copy], stored(target))
    part = target[copy.target_box.slices]
    assert torch.equal(bits(part), bits(expected[copy.target_box.slices]))
    assert int((bits(target) != 0).sum()) == int((bits(part) != 0).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_changed", "index_bytes", "num_values"),
    [
        (1, 2, 1),
        (4095, 2 * 4095, 4095),  # positions: below one in sixteen
        (4097, 2**13, 4097),  # bitmap: one bit per element
        (2**16, 0, 2**16),  # dense
    ],
)
def test_the_shortest_form_is_taken(dtype, num_changed, index_bytes, num_values):
    base = torch.zeros(256, 256, dtype=dtype)
    new = base.clone()
    where = torch.randperm(2**16, generator=torch.Generator().manual_seed(1))[:num_changed]
    bits(new).view(-1)[where] = 1
    body = encode_delta([copy_all(new.shape)], stored(new), stored(base))
    assert len(body) == 8 + 12 + index_bytes + num_values * dtype.itemsize
    apply_delta(body, [copy_all(new.shape)], stored(base))
    assert torch.equal(bits(base), bits(new))


def test_chunks_choose_for_themselves_and_unchanged_ones_cost_nothing():
    base = torch.zeros(1024, 256, dtype=torch.bfloat16)  # four chunks of 256 rows
    new = base.clone()
    new[:256] = 1.0
    new[300, 7] = -0.0
    new[512:600] = 2.0
    body = encode_delta([copy_all(base.shape)], stored(new), stored(base))
    assert len(body) == 8 + 3 * 12 + 2 * 2**16 + (2 + 2) + (2**13 + 2 * 88 * 256)
    assert len(encode_delta([copy_all(base.shape)], stored(new), stored(new))) == 8


def test_signs_of_zero_and_payloads_of_nan_are_changes():
    base = torch.tensor([0.0, float("nan"), 1.0])
    new = base.clone()
    bits(new)[0] = -(2**31)  # -0.0 == 0.0
    bits(new)[1] += 1  # another NaN
    apply_delta(
        encode_delta([copy_all((3,))], stored(new), stored(base)), [copy_all((3,))], stored(base)
    )
    assert torch.equal(bits(base), bits(new))
    same_nan = encode_delta([copy_all((3,))], stored(new), stored(new.clone()))
    assert len(same_nan) == 8  # NaN != NaN, but the bits are equal


def test_rows_longer_than_a_chunk_are_cut():
    base = random_bits((3, 150_000), torch.bfloat16, 1)
    new = changed(base, 0.01, 2)
    body = encode_delta([copy_all(base.shape)], stored(new), stored(base))
    assert len(body) < 0.05 * new.nbytes
    apply_delta(body, [copy_all(base.shape)], stored(base))
    assert torch.equal(bits(base), bits(new))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_damaged_deltas_are_refused_or_leave_what_a_digest_can_tell(data, seed):
    base = random_bits((20, 30), torch.bfloat16, seed)
    new = changed(base, data.draw(st.sampled_from([0.01, 0.3, 1.0])), seed)
    body = encode_delta([copy_all(base.shape)], stored(new), stored(base))
    cut = data.draw(st.integers(0, len(body) - 1))
    kept = base.clone()
    with pytest.raises(StaleWeightsError):
        apply_delta(body[:cut], [copy_all(base.shape)], stored(base))
    assert torch.equal(bits(base), bits(kept))
    body[cut] ^= 1 << data.draw(st.integers(0, 7))
    try:
        apply_delta(body, [copy_all(base.shape)], stored(base))
    except StaleWeightsError:
        return
    assert not torch.equal(bits(base), bits(new))


def test_headers_survive_the_wire():
    for base in (None, V0):
        header = DeltaHeader("f" * 64, base, V1)
        packed = header.pack()
        assert len(packed) == DeltaHeader.NUM_BYTES
        assert DeltaHeader.unpack(packed) == header


PLAN = "p" * 64


@pytest.mark.parametrize(
    ("held", "base"),
    [(None, V0), (V1, V0), (V0, V1), (V0, ServedVersion(V0.number, V0.digest - 1))],
)
def test_a_delta_on_top_of_anything_else_than_what_is_held_is_refused(held, base):
    chain = Chain(held)
    with pytest.raises(StaleWeightsError, match="nothing was written, push the full weights"):
        chain.accept([DeltaHeader(PLAN, base, V2)], PLAN)
    assert chain.held == held


def test_what_is_being_written_is_no_base_until_its_digest_was_checked():
    chain = Chain(V0)
    chain.accept([DeltaHeader(PLAN, V0, V1), DeltaHeader(PLAN, None, V1)], PLAN)
    assert chain.held is None
    with pytest.raises(StaleWeightsError, match="held is None"):
        chain.accept([DeltaHeader(PLAN, V1, V2)], PLAN)
    chain.accept([DeltaHeader(PLAN, None, V1)], PLAN)  # the full weights need no base
    chain.confirm(V1)
    chain.accept([DeltaHeader(PLAN, V0, V1)], PLAN)  # replayed: it overwrites what is there


def test_deltas_of_another_plan_or_of_two_versions_are_refused():
    chain = Chain(V0)
    with pytest.raises(StaleWeightsError, match="plan again"):
        chain.accept([DeltaHeader("q" * 64, V0, V1)], PLAN)
    with pytest.raises(StaleWeightsError, match="all sources must send the same version"):
        chain.accept([DeltaHeader(PLAN, V0, V1), DeltaHeader(PLAN, V0, V2)], PLAN)
    assert chain.held == V0


def test_a_baseline_is_a_copy_that_moves_only_when_told():
    weights = random_bits((4, 4), torch.bfloat16, 1)
    baseline, first = Baseline(), weights.clone()
    assert baseline.version is None
    baseline.advance(V0, stored(weights))
    bits(weights)[1] ^= 1
    bits(weights)[2] ^= 1
    target = first.clone()
    body = encode_delta([copy_all((4, 4))], stored(weights), baseline.storages)
    # never acknowledged, so the next delta must bring these changes, too
    bits(weights)[1] ^= 1
    bits(weights)[3] ^= 1
    body = encode_delta([copy_all((4, 4))], stored(weights), baseline.storages)
    apply_delta(body, [copy_all((4, 4))], stored(target))
    assert baseline.version == V0
    assert torch.equal(bits(target), bits(weights))
    baseline.advance(V2, stored(weights))
    assert len(encode_delta([copy_all((4, 4))], stored(weights), baseline.storages)) == 8
