"""What every trajectory must be, however it ended: the rules of fork and join in words."""

from __future__ import annotations

import numpy as np

from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.schema.tags import Vocabulary


def assert_is_a_tree(trajectory: Trajectory, vocabulary: Vocabulary) -> None:
    """Hold places, headers and forks of a trajectory, whole or cut short, against the rules.

    A stream counts up; branches start behind the fork's newline; the trunk goes on behind the
    furthest one; a fork opens every planned branch with its whole header, or none.
    """
    length, block, branch = trajectory.prompt_length, trajectory.block, trajectory.branch
    positions = trajectory.position_ids
    assert not block[:length].any()
    assert positions[:length].tolist() == list(range(length))
    assert ((block == 0) == (branch == 0)).all()
    if trajectory.mode is DecodeMode.SEQUENTIAL:
        assert not block.any()
    borders = np.flatnonzero((np.diff(block) != 0) | (np.diff(branch) != 0)) + 1
    pieces = np.split(np.arange(len(block)), borders)
    assert all((np.diff(positions[piece]) == 1).all() for piece in pieces)
    trunk_end, number, at = -1, 0, 0
    while at < len(pieces):
        piece = pieces[at]
        assert block[piece[0]] == 0
        assert positions[piece[0]] == trunk_end + 1
        trunk_end, at = int(positions[piece[-1]]), at + 1
        if at == len(pieces):
            return
        number += 1
        branches = []
        while at < len(pieces) and block[pieces[at][0]] == number:
            branches.append(pieces[at])
            at += 1
        _assert_is_a_whole_fork(trajectory, piece, branches, vocabulary)
        assert {int(positions[piece[0]]) for piece in branches} == {trunk_end + 1}
        trunk_end = max(int(positions[piece[-1]]) for piece in branches)


def _assert_is_a_whole_fork(
    trajectory: Trajectory,
    trunk: np.ndarray,
    branches: list[np.ndarray],
    vocabulary: Vocabulary,
) -> None:
    token_ids, forced = trajectory.token_ids, trajectory.forced
    before = token_ids[trunk[trunk >= trajectory.prompt_length]].tolist()
    assert before[-2:] == [vocabulary.guideline_close, vocabulary.newline]
    assert forced[trunk[-1]]
    guideline = before[len(before) - before[::-1].index(vocabulary.guideline_open) :]
    assert len(branches) == guideline.count(vocabulary.plan_open)
    for number, piece in enumerate(branches, start=1):
        header = vocabulary.step_header(number)
        assert (trajectory.branch[piece] == number).all()
        assert tuple(token_ids[piece[: len(header)]].tolist()) == tuple(header)
        assert forced[piece[: len(header)]].all()
