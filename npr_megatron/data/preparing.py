"""Training and validation samples from the files a run names, or every reason why not.

All files are read to their ends before anything is refused, so one start tells everything. What was
read is kept on disk; a second start with the same files, tokenizer and limits reads nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from npr_megatron.config.sft import DataSection
from npr_megatron.data.conversations import Exchange, read_exchanges
from npr_megatron.data.rows import Fault, FaultKind, files_of, list_faults
from npr_megatron.data.sample_store import SampleStore, StoreWriter, digest_of, open_store
from npr_megatron.data.tokenising import (
    ExchangeReader,
    Tokenised,
    read_here,
    turn_end_problem,
)
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import ConfigError, InputError

_REPORT_EVERY = 256
Reading = Callable[[ExchangeReader, Iterable[Exchange | Fault]], Iterator[Tokenised | Fault]]
_REMEDIES: dict[FaultKind, str] = {
    "corrupt": "{} rows cannot be learnt from; correct or delete them",
    "malformed": '{} responses break the grammar; correct them, or set data.malformed = "skip"',
    "over_long": (
        '{} samples are too long; raise trainer.row_tokens, or set data.over_long = "skip"'
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """What a run learns from and is measured on."""

    train: SampleStore
    validation: SampleStore | None
    skipped: tuple[Fault, ...]
    """Samples left out because the run file says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLimits:
    """What a sample must fit."""

    max_tokens: int
    """A packed row."""
    max_positions: int
    """The model."""


def open_prepared(folder: Path, data: DataSection) -> PreparedData:
    """Return what :func:`prepare` left in ``folder``."""
    train = open_store(folder / "train")
    assert train is not None, "prepare comes first"
    listed = json.loads((folder / "skipped.json").read_text(encoding="utf-8"))
    has_validation = bool(data.validation or data.validation_frac)
    return PreparedData(
        train=train,
        validation=open_store(folder / "validation") if has_validation else None,
        skipped=tuple(Fault(**fault) for fault in listed),
    )


def prepare(
    data: DataSection,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    folder: Path,
    limits: SampleLimits,
    *,
    seed: int,
    report: Callable[[int], None] = lambda num_rows: None,
    read: Reading = read_here,
) -> PreparedData:
    """Read, check and tokenise all files into ``folder``, or take what an earlier start left there.

    Args:
        report: called now and then with the rows read so far.
        read: makes samples of exchanges, in order.

    Raises:
        ConfigError: listing the files that cannot be read and the first rows that may not be
            learnt from; nothing was written.
    """
    train_files, held_out_files = _files(data)
    made_from = _fingerprint(data, tokenizer_folder, limits, seed, [*train_files, *held_out_files])
    if open_store(folder / "train", made_from=made_from) is None:
        sorter = _Sorter(data, tokenizer, limits, seed, report, read)
        sorter.write(folder, made_from, train_files, held_out_files)
    return open_prepared(folder, data)


class _Sorter:
    """Puts samples where they belong, and remembers every one that belongs nowhere."""

    def __init__(
        self,
        data: DataSection,
        tokenizer: Tokenizer,
        limits: SampleLimits,
        seed: int,
        report: Callable[[int], None],
        read: Reading,
    ) -> None:
        self._data, self._seed, self._report, self._read_all = data, seed, report, read
        self._tokenizer = tokenizer
        self._reader = ExchangeReader(
            tokenizer, max_tokens=limits.max_tokens, max_positions=limits.max_positions
        )
        self._refused: list[Fault] = []
        self._skipped: list[Fault] = []
        self._num_read = 0
        self._num_kept = {"train": 0, "validation": 0}
        self._held_out: dict[int, str] = {}

    def write(
        self,
        folder: Path,
        made_from: str,
        train_files: Sequence[Path],
        held_out_files: Sequence[Path],
    ) -> None:
        """Write the stores of ``folder``, or raise everything that is wrong and write nothing."""
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(StoreWriter(folder / name, made_from=made_from))
                for name in ("train", "validation")  # left in reverse: train is published last
            }
            problems: list[str] = []
            for files, is_held_out in ((held_out_files, True), (train_files, False)):
                for path in files:
                    try:
                        self._read(path, writers, is_held_out=is_held_out)
                    except InputError as error:
                        problems.append(str(error))
            if problems := [*problems, *self._problems()]:
                raise ConfigError(problems)
            skipped = json.dumps([asdict(fault) for fault in self._skipped])
            (folder / "skipped.json").write_text(skipped, encoding="utf-8")

    def _read(self, path: Path, writers: dict[str, StoreWriter], *, is_held_out: bool) -> None:
        for found in self._samples(path):
            if isinstance(found, Fault):
                is_skipped = (found.kind == "over_long" and self._data.over_long == "skip") or (
                    found.kind == "malformed" and self._data.malformed == "skip"
                )
                (self._skipped if is_skipped else self._refused).append(found)
                continue
            key = _key(found, self._seed)
            name = "validation" if is_held_out or self._is_drawn(key) else "train"
            if is_held_out:
                self._held_out.setdefault(key, found.place)
            elif key in self._held_out:
                message = f"the same as {self._held_out[key]}, which is held out"
                self._refused.append(Fault(found.place, "corrupt", message))
                continue
            self._num_kept[name] += 1
            if not self._refused:
                writers[name].add(found)

    def _samples(self, path: Path) -> Iterator[Tokenised | Fault]:
        for found in self._read_all(self._reader, read_exchanges(path)):
            yield found
            self._num_read += 1
            if self._num_read % _REPORT_EVERY == 0:
                self._report(self._num_read)

    def _is_drawn(self, key: int) -> bool:
        return key < self._data.validation_frac * 2**64

    def _problems(self) -> list[str]:
        found = [problem for problem in [turn_end_problem(self._tokenizer)] if problem]
        found += list_faults(self._refused)
        counts: Counter[FaultKind] = Counter(fault.kind for fault in self._refused)
        found += [_REMEDIES[kind].format(count) for kind, count in counts.items()]
        if not found and not self._num_kept["train"]:
            found.append(
                f"data.train leaves no sample to learn ({len(self._skipped)} were skipped); "
                "give more rows"
            )
        wants_validation = bool(self._data.validation or self._data.validation_frac)
        if not found and wants_validation and not self._num_kept["validation"]:
            found.append(
                "validation was asked for and no sample was held out; give more rows, or leave "
                "data.validation and data.validation_frac out"
            )
        return found


def _files(data: DataSection) -> tuple[list[Path], list[Path]]:
    problems: list[str] = []
    found: tuple[list[Path], list[Path]] = ([], [])
    for name, patterns, files in (
        ("train", data.train, found[0]),
        ("validation", data.validation, found[1]),
    ):
        for pattern in patterns:
            try:
                files += files_of(pattern)
            except InputError as error:
                problems.append(f"data.{name}: {error}")
    if problems:
        raise ConfigError(problems)
    return found


def _fingerprint(
    data: DataSection, tokenizer_folder: Path, limits: SampleLimits, seed: int, files: list[Path]
) -> str:
    """Name what the stores depend on; files by size and time, since reading them is the work."""
    parts = [data.model_dump_json(), repr(limits), str(seed)]
    for path in files:
        for part in sorted(path.iterdir()) if path.is_dir() else [path]:
            stat = part.stat()
            parts.append(f"{part} {stat.st_size} {stat.st_mtime_ns}")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    contents = [(tokenizer_folder / name) for name in names]
    return digest_of(
        [
            *(part.encode() for part in parts),
            *(path.read_bytes() for path in contents if path.exists()),
        ]
    )


def _key(sample: Tokenised, seed: int) -> int:
    digest = digest_of([sample.token_ids.tobytes(), str(seed).encode()])
    return int(digest[:16], 16)
