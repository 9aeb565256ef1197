"""Tokenised samples on disk: written once by one process, mapped into memory by every rank.

    token_ids.i32 position_ids.i32 block.i32 branch.i32     all samples, end to end
    index.npz                                               where each begins, its prompt, its pairs
    places.txt                                              file and row of each
    store.json                                              counts, what it was made from, digest

A folder of that name is complete: it is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npr_megatron.data.packing import Index
from npr_megatron.data.samples import sft_sample
from npr_megatron.data.tokenising import Tokenised
from npr_megatron.records.sample import TrainingSample
from npr_megatron.topology.layout import BranchLayout, predecessors
from npr_megatron.topology.pairs import num_visible_pairs

_STREAMS = ("token_ids", "position_ids", "block", "branch")
_ABOUT = "store.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStore:
    """Samples by number, in the order of their rows."""

    folder: Path
    digest: str
    """Of every id, place in the tree and prompt length: equal data, equal digest."""
    lengths: Index
    """Tokens of each sample."""
    pairs: Index
    """Attention pairs of each sample (``topology.pairs``)."""
    places: tuple[str, ...]
    _starts: Index
    _prompt_lengths: Index
    _streams: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum())

    @property
    def num_learnt(self) -> int:
        """Tokens of all responses."""
        return int((self.lengths - self._prompt_lengths).sum())

    def sample(self, number: int) -> TrainingSample:
        """Return a sample; its labels follow the tree, the prompt is not learnt."""
        start, length = self._starts[number], self.lengths[number]
        ids, positions, block, branch = (
            np.array(self._streams[name][start : start + length]) for name in _STREAMS
        )
        layout = BranchLayout(
            position_ids=positions,
            block=block,
            branch=branch,
            predecessor=predecessors(block, branch),
            forced=np.zeros(len(ids), dtype=np.bool_),
        )
        return sft_sample(ids, int(self._prompt_lengths[number]), layout)


class StoreWriter:
    """Writes one store, sample by sample.

    Example::

        with StoreWriter(folder, made_from="...") as writer:
            writer.add(tokenised)
        store = open_store(folder, made_from="...")     # complete from here on
    """

    def __init__(self, folder: Path, *, made_from: str) -> None:
        self._folder, self._made_from = folder, made_from
        self._partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = {name: (self._partial / f"{name}.i32").open("wb") for name in _STREAMS}
        self._places = (self._partial / "places.txt").open("w", encoding="utf-8")
        self._hash = hashlib.blake2b(digest_size=16)
        self._lengths: list[int] = []
        self._prompt_lengths: list[int] = []
        self._pairs: list[int] = []

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in (*self._files.values(), self._places):
            file.close()
        if kind is not None:
            shutil.rmtree(self._partial)
            return
        self._publish()

    def add(self, sample: Tokenised) -> None:
        """Append a sample."""
        layout = sample.layout
        values = (sample.token_ids, layout.position_ids, layout.block, layout.branch)
        for name, stream in zip(_STREAMS, values, strict=True):
            data = np.ascontiguousarray(stream, dtype="<i4").tobytes()
            self._files[name].write(data)
            self._hash.update(data)
        self._hash.update(sample.prompt_length.to_bytes(8, "little"))
        self._places.write(sample.place + "\n")
        self._lengths.append(len(sample.token_ids))
        self._prompt_lengths.append(sample.prompt_length)
        self._pairs.append(num_visible_pairs(layout.block, layout.branch))

    def _publish(self) -> None:
        np.savez(
            self._partial / "index.npz",
            lengths=np.array(self._lengths, dtype=np.int64),
            prompt_lengths=np.array(self._prompt_lengths, dtype=np.int64),
            pairs=np.array(self._pairs, dtype=np.int64),
        )
        about = {"made_from": self._made_from, "digest": self._hash.hexdigest()}
        (self._partial / _ABOUT).write_text(json.dumps(about))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._partial.rename(self._folder)


def open_store(folder: Path, *, made_from: str | None = None) -> SampleStore | None:
    """Return the store in ``folder``; None where there is none made from ``made_from``."""
    about = folder / _ABOUT
    if not about.exists():
        return None
    recorded = json.loads(about.read_text())
    if made_from not in (None, recorded["made_from"]):
        return None
    with np.load(folder / "index.npz") as index:
        lengths, prompts, pairs = (index[n] for n in ("lengths", "prompt_lengths", "pairs"))
    return SampleStore(
        folder=folder,
        digest=recorded["digest"],
        lengths=lengths,
        pairs=pairs,
        places=tuple((folder / "places.txt").read_text(encoding="utf-8").split("\n")[:-1]),
        _starts=np.cumsum(lengths) - lengths,
        _prompt_lengths=prompts,
        _streams={name: _mapped(folder / f"{name}.i32") for name in _STREAMS},
    )


def _mapped(path: Path) -> Any:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype="<i4")  # an empty file cannot be mapped
    return np.memmap(path, dtype="<i4", mode="r")


def digest_of(parts: Iterable[bytes]) -> str:
    """Return a short digest of ``parts``, borders included."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
