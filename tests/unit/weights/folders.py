"""Small checkpoints on disk, one model of each family."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npr_megatron.config.model import InitConfig, ModelConfig, MoeConfig
from npr_megatron.weights.checkpoints.chunking import ReaderShape
from npr_megatron.weights.checkpoints.conversion import Conversion, Request
from npr_megatron.weights.checkpoints.hf import random_init, write_hf

_MOE = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
QWEN3 = ModelConfig(
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    vocab_size=70,
)
UNTIED = QWEN3.model_copy(update={"tie_word_embeddings": False})
MODELS = {
    "qwen3": QWEN3,
    "qwen3_moe": UNTIED.model_copy(update={"family": "qwen3_moe", "moe": _MOE}),
    "llama": UNTIED.model_copy(update={"family": "llama", "has_qk_norm": False}),
    "glm4_moe": UNTIED.model_copy(
        update={
            "family": "glm4_moe",
            "moe": _MOE.model_copy(
                update={
                    "num_dense_layers": 1,
                    "shared_intermediate_size": 48,
                    "has_expert_bias": True,
                }
            ),
        }
    ),
}


def write_hf_folder(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model in which no two elements are alike by design, norms included."""
    tensors = {
        name: (tensor + _noise(name, tensor)).to(torch.float32 if name.endswith("_bias") else dtype)
        for name, tensor in random_init(model, InitConfig(), seed=5).items()
    }
    write_hf(folder, model, tensors)
    (folder / "tokenizer.json").write_text('{"model": "of words"}')
    return folder


def write_fp8_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a model with projections in blockwise FP8; return the numbers that it stands for."""
    model = UNTIED.model_copy(update={"hidden_size": 144, "intermediate_size": 264})
    tensors = hf_tensors(write_hf_folder(folder, model))
    numbers = dict(tensors)
    for name, tensor in numbers.items():
        if name.endswith("_proj.weight"):
            grid = [-(-n // 128) for n in tensor.shape]
            scales = torch.arange(1.0, 1 + math.prod(grid)).view(grid) / 64
            factor = torch.kron(scales, torch.ones(128, 128))
            tensors[name] = (tensor / factor[tuple(map(slice, tensor.shape))]).to(
                torch.float8_e4m3fn
            )
            tensors[f"{name}_scale_inv"] = scales
            numbers[name] = tensors[name].float() * factor[tuple(map(slice, tensor.shape))]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, numbers


def _noise(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(like.shape, generator=generator) / 8


def convert(source: Path, target: Path, **asked) -> Path:
    """Convert and return the target."""
    if "reader_shape" in asked:
        asked["reader_shape"] = ReaderShape(*asked["reader_shape"])
    Conversion(Request(source=source, target=target, **asked)).run(lambda progress: None)
    return target


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """Read an HF folder with the library that HF uses."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two models have equal names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )
