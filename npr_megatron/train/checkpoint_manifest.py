"""What a checkpoint is of and what it consists of, with a digest of every byte. No torch.

``manifest.json`` is written last, so a folder without one is no checkpoint::

    {"digest": "9c1f...",            of the rest of this file
     "step": 12,
     "progress": {"step": 12},       what the caller handed in
     "origin": {"model": {...}, "dtype": "fp32", "optimizer": "adam"},
     "parallel": {"tp_size": 2, ...},
     "versions": {"megatron_core": "0.16.1", ...},
     "files": {"__0_0.distcp": {"num_bytes": 81920, "sha256": "77ab..."}, ...}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import InputError
from npr_megatron.weights.durable import force_to_disk

MANIFEST = "manifest.json"
_ABSENT = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a trainer must have in common with the checkpoint that it loads; no layout is."""

    model: ModelConfig
    dtype: str
    optimizer: str
    """As Megatron names it: ``adam``, ``muon``."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "model": self.model.model_dump(mode="json"),
            "dtype": self.dtype,
            "optimizer": self.optimizer,
        }

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Return one phrase for each field in which what is recorded is not this."""
        own, there = self.to_json(), dict(recorded)
        model = model_differences(there.pop("model", {}), self.model)
        del own["model"]
        return [*model, *_differences(there, own)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known of a checkpoint without reading its tensors."""

    step: int
    progress: dict[str, Any]
    """JSON values of the caller's."""
    origin: dict[str, Any]
    """``Origin.to_json`` of who saved it."""
    parallel: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Every file but this one, by its name in the folder."""

    @property
    def num_bytes(self) -> int:
        """Size of all files [bytes]."""
        return sum(record.num_bytes for record in self.files.values())


def model_differences(recorded: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """Return one phrase for each field of the architecture that is not as recorded."""
    return _differences(recorded, model.model_dump(mode="json"))


def _differences(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    fields = [
        (name, recorded.get(name, _ABSENT), own.get(name, _ABSENT))
        for name in sorted({*recorded, *own})
    ]
    return [
        f"{name} is {there} there, {here} here" for name, there, here in fields if there != here
    ]


def record_file(path: Path) -> FileRecord:
    """Force a file to disk and return what it is."""
    force_to_disk(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(num_bytes=path.stat().st_size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` to ``folder`` and force it to disk."""
    content = asdict(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps({"digest": _digest(content)} | content, indent=1), encoding="utf-8")
    force_to_disk(path)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder``.

    Raises:
        InputError: there is none, or it is not as it was written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(**content, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so nobody knows whether the "
            "checkpoint is whole; bring the file back or remove the folder"
        ) from error
    if digest != _digest(asdict(manifest)):
        raise InputError(f"{path} is not as it was written; bring it back or remove the folder")
    return manifest


def missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return one sentence for each file that is not there or has another size."""
    problems: list[str] = []
    for name, record in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{folder / name} cannot be read ({error.strerror})")
            continue
        if num_bytes != record.num_bytes:
            problems.append(f"{folder / name} has {num_bytes} bytes, written {record.num_bytes}")
    return problems


def damaged_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return one sentence for each of the files ``names`` whose bytes are not those written."""
    problems: list[str] = []
    for name in names:
        try:
            found = record_file(folder / name)
        except OSError as error:
            problems.append(f"{folder / name} cannot be read ({error.strerror})")
            continue
        if found != manifest.files[name]:
            problems.append(
                f"{folder / name} is not as it was written ({found.num_bytes} bytes of "
                f"{manifest.files[name].num_bytes}, SHA-256 {found.sha256[:8]}, written "
                f"{manifest.files[name].sha256[:8]})"
            )
    return problems


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
