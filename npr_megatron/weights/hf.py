"""HF checkpoints of dense Qwen3: read lazily, written whole, or drawn from random numbers.

Tensors that the model does not have, or in a dtype that is not a plain float, are refused, never
skipped. A written folder appears under its name only when complete. The architecture in
``config.json`` is read by ``config.hf_architecture``, which needs no torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.errors import InputError, LayoutError
from npr_megatron.records.randomness import derive_seed
from npr_megatron.weights.box import Box
from npr_megatron.weights.hf_config import hf_config
from npr_megatron.weights.layout import canonical_layout
from npr_megatron.weights.names import EMBEDDING, LM_HEAD, Parameter, canonical_parameters
from npr_megatron.weights.storages import check_storages

_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_COPIED_CONFIG_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_READABLE_DTYPES = ("F32", "BF16", "F16")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; give an HF folder") from error


class HfCheckpoint:
    """An open checkpoint whose parameters are read box by box.

    Use as a context manager::

        with read_hf(folder, model) as checkpoint:
            load_tiles(rank_layout, checkpoint.read, storages)
    """

    def __init__(self, files: ExitStack, owners: Mapping[str, Any]) -> None:
        self._files = files
        self._owners = owners

    def read(self, parameter: str, box: Box) -> Tensor:
        """Return ``parameter[box]`` in the dtype of the file; touches only those bytes."""
        return self._owners[parameter].get_slice(parameter)[box.slices]

    def __enter__(self) -> HfCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()


def read_hf(path: str | Path, model: ModelConfig) -> HfCheckpoint:
    """Open the safetensors of folder ``path`` and check every name, shape and dtype.

    The ``lm_head.weight`` that some tied checkpoints store besides the embedding is ignored, as
    transformers does.

    Raises:
        InputError: files are missing, or the tensors are not those of ``model``; lists all.
    """
    with ExitStack() as files:
        try:
            owners = {
                name: opened
                for file in _weight_files(Path(path))
                for opened in [files.enter_context(safe_open(file, framework="pt"))]
                for name in opened.keys()  # noqa: SIM118 - not a dict
            }
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: weights cannot be read ({error})") from error
        problems = _tensor_problems(owners, model)
        if problems:
            raise InputError(f"{path} does not hold the model asked for:\n" + "\n".join(problems))
        return HfCheckpoint(files.pop_all(), owners)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def _tensor_problems(owners: Mapping[str, Any], model: ModelConfig) -> list[str]:
    expected = {parameter.name: parameter.shape for parameter in canonical_parameters(model)}
    ignored = {LM_HEAD} if model.tie_word_embeddings else set[str]()
    problems = [f"unknown tensor {name}" for name in owners.keys() - expected.keys() - ignored]
    for name, shape in expected.items():
        if name not in owners:
            problems.append(f"missing tensor {name} {list(shape)}")
            continue
        header = owners[name].get_slice(name)
        if tuple(header.get_shape()) != shape:
            problems.append(f"{name} has shape {header.get_shape()}, expected {list(shape)}")
        if header.get_dtype() not in _READABLE_DTYPES:
            problems.append(f"{name} is {header.get_dtype()}, readable are {_READABLE_DTYPES}")
    return sorted(problems)


def write_hf(
    path: str | Path,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    source_folder: str | Path | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that ``transformers.AutoModelForCausalLM`` loads; replaces an older one.

    The folder is complete when it appears: it is written beside its place and renamed. One writer
    at a time.

    Args:
        tensors: every canonical parameter, of one dtype (fp32 or bf16).
        source_folder: tokenizer files and special token ids are taken from there.
        max_file_bytes: weights are split over files of at most so many bytes (one tensor at least).

    Raises:
        LayoutError: ``tensors`` are not the parameters of ``model``, or not fp32 or bf16.
        InputError: ``source_folder`` is not a folder.
    """
    check_storages(canonical_layout(model).ranks[0], tensors)
    config = hf_config(model) | {"dtype": _dtype_name(tensors)}
    with _replaced_folder(Path(path)) as folder:
        if source_folder is not None:
            config |= _copy_companions(Path(source_folder), folder)
        _write_json(folder / "config.json", config)
        _write_tensors(folder, tensors, max_file_bytes)


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    dtype = next(iter(tensors.values())).dtype
    if dtype not in _DTYPE_NAMES:
        raise LayoutError(f"an HF folder was to be written in {dtype}; give fp32 or bf16 tensors")
    return _DTYPE_NAMES[dtype]


def _copy_companions(source: Path, folder: Path) -> dict[str, Any]:
    """Copy tokenizer files; return the special token ids of the source's ``config.json``."""
    if not source.is_dir():
        raise InputError(f"source_folder {source} is not a folder; give an HF or tokenizer folder")
    for name in _COPIED_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if not (source / "config.json").exists():
        return {}
    config = _read_json(source / "config.json")
    return {key: config[key] for key in _COPIED_CONFIG_KEYS if key in config}


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_file_bytes: int) -> None:
    files: list[dict[str, Tensor]] = [{}]
    room = max_file_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and files[-1]:
            files.append({})
            room = max_file_bytes
        files[-1][name] = tensor.detach().cpu().contiguous()
        room -= tensor.nbytes
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replaced_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``final`` if the body succeeds and vanishes if not."""
    partial = final.with_name(f".{final.name}.partial")
    retired = final.with_name(f".{final.name}.retired")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            _flush(file)
        # POSIX cannot swap two folders: the old one steps aside first.
        shutil.rmtree(retired, ignore_errors=True)
        if final.exists():
            final.rename(retired)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def _flush(file: Path) -> None:
    """Force the bytes to disk, or a power cut after the rename leaves an empty file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_init(model: ModelConfig, init: InitConfig, seed: int) -> dict[str, Tensor]:
    """Return fp32 canonical parameters of a new model; norms are 1.

    Each parameter is drawn from its own stream, keyed by its name and ``seed``: the values depend
    on no layout, rank or order.
    """
    return {
        parameter.name: _random_parameter(parameter, model, init, seed)
        for parameter in canonical_parameters(model)
    }


def _random_parameter(
    parameter: Parameter, model: ModelConfig, init: InitConfig, seed: int
) -> Tensor:
    if len(parameter.shape) == 1:
        return torch.ones(parameter.shape)
    std = init.matrix_gain / math.sqrt(parameter.shape[1])
    if parameter.name == EMBEDDING:
        std = init.embedding_std
    elif parameter.name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * model.num_hidden_layers)
    stream = np.random.Generator(np.random.Philox(derive_seed("init", parameter.name, seed)))
    values = stream.standard_normal(parameter.shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)
