"""The distinct tokens of a list that only grows; each entry is looked at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npr_megatron.records.trajectory import BoolArray

_FIRST_ROOM = 64


class DistinctTokens:
    """Which tokens a stretch of text holds, and which of them the model chose itself.

    Example: after ``[5, 6, 5]`` with only the last one sampled, ``ids`` is ``[5, 6]`` and
    ``is_sampled`` is ``[True, False]``.
    """

    __slots__ = ("_ids", "_index_of", "_is_sampled", "_num_read")

    def __init__(self) -> None:
        self._num_read = 0
        self._index_of: dict[int, int] = {}
        self._ids = np.empty(_FIRST_ROOM, np.int64)
        self._is_sampled = np.zeros(_FIRST_ROOM, np.bool_)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """[D] in order of appearance; valid until the next :meth:`read`."""
        return self._ids[: len(self._index_of)]

    @property
    def is_sampled(self) -> BoolArray:
        """[D] whether the token was sampled at least once, not only given or forced."""
        return self._is_sampled[: len(self._index_of)]

    def read(self, token_ids: Sequence[int], forced: Sequence[bool]) -> None:
        """Take in what was appended to the two aligned lists since the last time."""
        start, self._num_read = self._num_read, len(token_ids)
        for token_id, is_forced in zip(token_ids[start:], forced[start:], strict=True):
            index = self._index_of.get(token_id)
            if index is None:
                index = self._add(token_id)
            self._is_sampled[index] |= not is_forced

    def _add(self, token_id: int) -> int:
        index = self._index_of[token_id] = len(self._index_of)
        if index == len(self._ids):
            room = 2 * index
            self._ids = np.resize(self._ids, room)
            self._is_sampled = np.resize(self._is_sampled, room)
        self._ids[index], self._is_sampled[index] = token_id, False
        return index
