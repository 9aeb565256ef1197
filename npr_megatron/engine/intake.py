"""What an engine refuses before it starts: requests that can never be served, weights that do not
fit or are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.records.request import GenerationRequest
from npr_megatron.weights.quantise import QUANTISED


def request_problems(
    request: GenerationRequest, model: ModelConfig, config: EngineConfig
) -> list[str]:
    """Return one sentence for each reason why ``request`` can never be served."""
    problems: list[str] = []
    length = len(request.prompt_ids)
    if not request.prompt_ids:
        problems.append("the prompt is empty; give at least one token")
    elif min(request.prompt_ids) < 0 or max(request.prompt_ids) >= model.vocab_size:
        problems.append(
            f"prompt ids reach from {min(request.prompt_ids)} to {max(request.prompt_ids)}, "
            f"the model has 0..{model.vocab_size - 1}; use the tokenizer of the model"
        )
    if request.max_new_tokens < 1 or request.max_critical_path < 1:
        problems.append(
            f"max_new_tokens is {request.max_new_tokens} and max_critical_path "
            f"{request.max_critical_path}; both must be at least 1"
        )
    if request.temperature < 0.0 or not 0.0 < request.top_p <= 1.0:
        problems.append(
            f"temperature is {request.temperature} and top_p {request.top_p}; "
            "temperature must be >= 0 and top_p in (0, 1]"
        )
    if not 0 <= request.seed < 1 << 64:
        problems.append(f"seed is {request.seed}; it must be an unsigned 64-bit number")
    num_positions = length + min(request.max_new_tokens, request.max_critical_path)
    if num_positions > model.max_position_embeddings:
        problems.append(
            f"prompt and critical path may reach {num_positions} positions, the model has "
            f"{model.max_position_embeddings}; lower max_critical_path or shorten the prompt"
        )
    num_slots = length + request.max_new_tokens
    if num_slots > config.num_kv_slots:
        problems.append(
            f"prompt and max_new_tokens need {num_slots} KV slots, the pool has "
            f"{config.num_kv_slots}; raise engine.num_kv_slots or lower max_new_tokens"
        )
    return problems


def weight_problems(given: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    """Return one sentence for each storage that is missing, unknown, of another shape, or not in
    FP8 where it must be, with scales.
    """
    problems = [f"storage {name} is missing" for name in sorted(live.keys() - given.keys())]
    problems += [f"storage {name} is unknown" for name in sorted(given.keys() - live.keys())]
    problems += [
        f"storage {name} has shape {tuple(given[name].shape)}, expected {tuple(live[name].shape)}"
        for name in sorted(live.keys() & given.keys())
        if given[name].shape != live[name].shape
    ]
    problems += [
        f"storage {name} is {given[name].dtype}, expected {QUANTISED} with its scales"
        for name in sorted(live.keys() & given.keys())
        if live[name].dtype == QUANTISED and given[name].dtype != QUANTISED
    ]
    return problems


def unfit_numbers(weights: Mapping[str, Tensor]) -> list[str]:
    """Return one sentence for each storage with a NaN or an infinity; reads every element once."""
    return [
        f"storage {name} of shape {tuple(tensor.shape)} holds NaN or infinity"
        for name, tensor in sorted(weights.items())
        if not _is_finite(tensor)
    ]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == QUANTISED:
        # e4m3 has no infinity, and the bits of a NaN are all ones but for the sign.
        return int(tensor.view(torch.uint8).bitwise_left_shift(1).max()) != 0xFE
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
