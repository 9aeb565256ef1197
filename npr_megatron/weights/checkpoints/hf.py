"""HF checkpoints of every family: read lazily, written whole, or drawn from random numbers.

Tensors that the model does not have, or in a dtype that is not a float, are refused, never skipped.
Matrices in blockwise FP8 (``weight`` in e4m3 with a ``weight_scale_inv`` per block) are read as the
numbers they stand for. A written folder appears under its name only when complete. The architecture
in ``config.json`` is read by ``config.hf_architecture``, which needs no torch.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.errors import EnvironmentFault, InputError, LayoutError
from npr_megatron.records.randomness import derive_seed
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.hf_config import hf_config
from npr_megatron.weights.checkpoints.safetensors_files import (
    INDEX_FILE,
    file_names,
    find_hf_tensors,
    index_of,
)
from npr_megatron.weights.checkpoints.stored import StoredTensor, read_box
from npr_megatron.weights.durable import force_to_disk
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.layouts.served import scales_of, touched_blocks
from npr_megatron.weights.names import (
    EMBEDDING,
    EXPERT_BIAS,
    Parameter,
    canonical_parameters,
)
from npr_megatron.weights.storages import check_storages, weights_dtype

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
_READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn
_FP8_BLOCK = 128
"""Rows and columns that share a scale in the FP8 checkpoints of DeepSeek and Qwen."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; give an HF folder") from error


class HfCheckpoint:
    """A checkpoint whose parameters are read box by box.

    Example::

        load_tiles(rank_layout, read_hf(folder, model).read, storages)
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def read(self, parameter: str, box: Box) -> Tensor:
        """Return ``parameter[box]``; touches little more than those bytes.

        In the dtype of the file, or in fp32 where the file has blockwise FP8.

        Raises:
            InputError: a file is missing or shorter than it was.
        """
        values = self._read(parameter, box)
        if values.dtype != _FP8:
            return values
        blocks = touched_blocks(box, _FP8_BLOCK)
        scales = self._read(scales_of(parameter), blocks).float()
        for axis, first in enumerate(box.start):
            inside = first - blocks.start[axis] * _FP8_BLOCK
            scales = scales.repeat_interleave(_FP8_BLOCK, axis)
            scales = scales.narrow(axis, inside, box.shape[axis])
        return values.float() * scales

    def _read(self, name: str, box: Box) -> Tensor:
        into = torch.empty(box.shape, dtype=self._tensors[name].dtype)
        read_box(self._tensors[name], box, into)
        return into


def read_hf(path: str | Path, model: ModelConfig) -> HfCheckpoint:
    """Open the safetensors of folder ``path`` and check every name, shape and dtype.

    The ``lm_head.weight`` that some tied checkpoints store besides the embedding is ignored, as
    transformers does.

    Raises:
        InputError: files are missing or cut short, or the tensors are not those of ``model``; lists
            all.
    """
    tensors, problems = find_hf_tensors(Path(path), model)
    if problems:
        raise InputError(f"{path}: weights cannot be read:\n" + "\n".join(problems))
    if problems := _tensor_problems(tensors, model):
        raise InputError(f"{path} does not hold the model asked for:\n" + "\n".join(problems))
    return HfCheckpoint(tensors)


def _tensor_problems(tensors: Mapping[str, StoredTensor], model: ModelConfig) -> list[str]:
    expected = {parameter.name: parameter.shape for parameter in canonical_parameters(model)}
    in_fp8 = [name for name in expected if name in tensors and tensors[name].dtype == _FP8]
    for name in in_fp8:
        expected[scales_of(name)] = tuple(-(-n // _FP8_BLOCK) for n in expected[name])
    problems = [f"unknown tensor {name}" for name in tensors.keys() - expected.keys()]
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"missing tensor {name} {list(shape)}")
            continue
        tensor = tensors[name]
        if tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in _READABLE_DTYPES and name not in in_fp8:
            problems.append(f"{name} is {tensor.dtype}, readable are {_READABLE_DTYPES}")
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
        tensors: every canonical parameter, of one dtype (fp32 or bf16) where none is pinned.
        source_folder: tokenizer files and special token ids are taken from there.
        max_file_bytes: weights are split over files of at most so many bytes (one tensor at least).

    Raises:
        LayoutError: ``tensors`` are not the parameters of ``model``, or not fp32 or bf16.
        InputError: ``source_folder`` is not a folder.
        EnvironmentFault: the disk is full or cannot be written; nothing new is left behind.
    """
    layout = canonical_layout(model).ranks[0]
    check_storages(layout, tensors)
    config = hf_config(model) | {"dtype": _dtype_name(weights_dtype(layout, tensors))}
    try:
        with _replaced_folder(Path(path)) as folder:
            if source_folder is not None:
                config |= _copy_companions(Path(source_folder), folder)
            _write_json(folder / "config.json", config)
            _write_tensors(folder, tensors, max_file_bytes)
    except (OSError, SafetensorError) as error:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        raise EnvironmentFault(
            f"a model of {num_bytes} bytes was to be written to {path}: {error}; what was there "
            "before is as it was: make room or choose another folder, and write again"
        ) from error


def _dtype_name(dtype: torch.dtype | None) -> str:
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
    named = dict(zip(file_names([list(part) for part in files]), files, strict=True))
    for file, part in named.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(named) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = index_of({file: list(part) for file, part in named.items()}, total)
        _write_json(folder / INDEX_FILE, index)


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
            force_to_disk(file)
        # POSIX cannot swap two folders: the old one steps aside first.
        shutil.rmtree(retired, ignore_errors=True)
        if final.exists():
            final.rename(retired)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def random_init(model: ModelConfig, init: InitConfig, seed: int) -> dict[str, Tensor]:
    """Return fp32 canonical parameters of a new model; norms are 1, biases 0.

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
    if parameter.name.endswith(EXPERT_BIAS):
        return torch.zeros(parameter.shape)
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
