"""Constant offsets, whatever part of a row is computed."""

import torch

from npr_megatron.engine.sglang.scheduler.positions import Offsets


def test_a_prefill_shifts_every_token_of_a_request():
    positions = torch.tensor([7, 8, 9, 3, 4])
    lengths = torch.tensor([3, 2], dtype=torch.int32)
    assert Offsets().added(positions, (-2, 0), lengths).tolist() == [5, 6, 7, 3, 4]
    assert positions.tolist() == [7, 8, 9, 3, 4]


def test_decoding_shifts_one_token_each():
    assert Offsets().added(torch.tensor([7, 3]), (-2, -1)).tolist() == [5, 2]


def test_no_position_is_negative():
    assert Offsets().added(torch.tensor([1, 5]), (-3, -3)).tolist() == [0, 2]


def test_without_offsets_nothing_is_computed():
    positions = torch.tensor([1, 2])
    assert Offsets().added(positions, (0, 0)) is positions


def test_kept_offsets_are_those_of_the_batch_and_of_its_dtype():
    offsets = Offsets()
    for batch in ((-1, 0), (-1, 0), (0, -1), (-1, 0, -2)):
        for dtype in (torch.int64, torch.int32):
            positions = torch.full((len(batch),), 10, dtype=dtype)
            found = offsets.added(positions, batch)
            assert found.tolist() == [10 + offset for offset in batch]
            assert found.dtype == dtype
