"""Open a checkpoint of either format by looking at its folder: HF safetensors or ``torch_dist``.

A ``torch_dist`` folder that we wrote carries ``hf/`` with config.json and the tokenizer; any other
needs to be told where those are. Opening reads headers only, checks every name, shape and dtype
against the architecture, and finds all deviations at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from npr_megatron.config.hf_architecture import read_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import InputError
from npr_megatron.weights.checkpoints.safetensors_files import find_hf_tensors
from npr_megatron.weights.checkpoints.stored import StoredCheckpoint, StoredTensor
from npr_megatron.weights.checkpoints.torch_dist_files import find_torch_dist_tensors
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.layouts.megatron_checkpoint import form_found, megatron_checkpoint_layout
from npr_megatron.weights.layouts.served import Quantisation, quantised_layout
from npr_megatron.weights.storages import dtype_of
from npr_megatron.weights.tiles import Layout

HF_FOLDER = "hf"
"""Inside a ``torch_dist`` folder: config.json and tokenizer files."""
BACKEND_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_POINTERS = ("latest", "latest_checkpointed_iteration.txt")
"""Files by which our trainer, and Megatron's, name their newest checkpoint."""
_WRAPPERS = ("module.", "model.")
"""What frameworks around Megatron put before its keys."""
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def open_checkpoint(path: Path, hf_folder: Path | None = None) -> StoredCheckpoint:
    """Open the checkpoint at ``path``.

    Args:
        hf_folder: where config.json is, for a ``torch_dist`` folder that carries none.

    Raises:
        InputError: it is no checkpoint, or not a whole one of its model; lists every problem.
    """
    checkpoint, problems = examine_checkpoint(path, hf_folder)
    if problems:
        raise InputError(f"{path} is not whole:\n" + "\n".join(problems))
    return checkpoint


def examine_checkpoint(
    path: Path, hf_folder: Path | None = None
) -> tuple[StoredCheckpoint, list[str]]:
    """Return what can be had of the checkpoint at ``path``, and one sentence per problem.

    Raises:
        InputError: it is no checkpoint at all, or its architecture is not known.
    """
    folder = _newest(path)
    if is_torch_dist(folder):
        hf_folder = hf_folder or folder / HF_FOLDER
        if not (hf_folder / "config.json").exists():
            raise InputError(
                f"{folder} is a torch_dist checkpoint without {HF_FOLDER}/config.json; say whose "
                "architecture it has with --hf HF_FOLDER"
            )
        model = read_architecture(hf_folder)
        found, problems = find_torch_dist_tensors(folder)
        tensors = _unwrapped(found)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        layout = megatron_checkpoint_layout(model, form_found(model, shapes))
    elif (folder / "config.json").exists():
        hf_folder = folder
        model = read_architecture(folder)
        tensors, problems = find_hf_tensors(folder, model)
        layout = _hf_layout(model, tensors)
    else:
        raise InputError(
            f"{path} is no checkpoint: it has neither config.json (an HF folder) nor "
            f"{BACKEND_FILE} (a torch_dist folder)"
        )
    problems += _deviations(layout, tensors)
    return StoredCheckpoint(folder, model, layout, tensors, hf_folder), problems


def is_torch_dist(folder: Path) -> bool:
    """Return whether ``folder`` is a ``torch_dist`` checkpoint.

    Raises:
        InputError: it is a distributed checkpoint of another backend.
    """
    file = folder / BACKEND_FILE
    if not file.exists():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); copy it again") from error
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != "torch_dist":
        raise InputError(f"{file} names backend {backend!r}, readable is 'torch_dist'")
    return True


def _newest(path: Path) -> Path:
    """Return the checkpoint that a trainer's folder of checkpoints points to, or ``path``."""
    for pointer in _POINTERS:
        if (path / pointer).is_file():
            name = (path / pointer).read_text().strip()
            return path / (f"iter_{name:0>7}" if name.isdigit() else name)
    return path


def _unwrapped(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return ``tensors`` by Megatron's own keys."""
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _hf_layout(model: ModelConfig, tensors: Mapping[str, StoredTensor]) -> Layout:
    """Return the layout of an HF folder, in which some matrices may be in blockwise FP8."""
    layout = canonical_layout(model)
    shapes = {
        storage.name: storage.shape
        for storage in layout.ranks[0].storages
        if len(storage.shape) == 2
        and storage.name in tensors
        and tensors[storage.name].dtype == torch.float8_e4m3fn
    }
    return quantised_layout(layout, Quantisation(shapes)) if shapes else layout


def _deviations(layout: Layout, tensors: Mapping[str, StoredTensor]) -> list[str]:
    declared = {storage.name: storage for storage in layout.ranks[0].storages}
    problems = [f"unknown tensor {name}" for name in tensors.keys() - declared.keys()]
    for name, storage in declared.items():
        if name not in tensors:
            problems.append(f"missing tensor {name} {list(storage.shape)}")
            continue
        found = tensors[name]
        if found.shape != storage.shape:
            problems.append(f"{name} has shape {list(found.shape)}, expected {list(storage.shape)}")
        if storage.dtype is not None and found.dtype != dtype_of(storage, torch.float32):
            problems.append(f"{name} is {found.dtype}, expected {dtype_of(storage, torch.float32)}")
        elif storage.dtype is None and found.dtype not in _WEIGHT_DTYPES:
            names = ", ".join(map(str, _WEIGHT_DTYPES))
            problems.append(f"{name} is {found.dtype}, expected one of {names}")
    return sorted(problems)
