"""What an engine refuses before it starts: requests that can never be served, weights that do not
fit or are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.weights.quantise import QUANTISED

_FINITE = (1e-5, 1e5)
"""Temperatures and penalties whose quotients with any score are finite in fp32."""


def refusals(
    request: GenerationRequest,
    model: ModelConfig,
    config: EngineConfig,
    unfinished: Collection[str],
) -> list[str]:
    """Return one sentence, which names the request, for each reason why it cannot be queued.

    Args:
        unfinished: ids of the requests that are queued or decoded already.
    """
    problems = request_problems(request, model, config)
    if request.request_id in unfinished:
        problems.append("a request of this id is unfinished; wait for it or use another rollout")
    return [f"request {request.request_id}: {problem}" for problem in problems]


def request_problems(
    request: GenerationRequest, model: ModelConfig, config: EngineConfig
) -> list[str]:
    """Return one sentence for each reason why ``request`` can never be served.

    Requests come from files and over the wire, so types are looked at too: what is refused here
    cannot break a step that others share.
    """
    problems = _kind_problems(request) + _prompt_problems(request, model)
    problems += _draw_problems(request)
    if not (_is_integer(request.max_new_tokens, 1) and _is_integer(request.max_critical_path, 1)):
        problems.append(
            f"max_new_tokens is {request.max_new_tokens!r} and max_critical_path "
            f"{request.max_critical_path!r}; both must be integers of at least 1"
        )
    elif isinstance(request.prompt_ids, tuple):
        problems += _room_problems(request, model, config)
    timeout_s = request.timeout_s
    if timeout_s is not None and (timeout_s == 0 or not _is_within(timeout_s, 0.0, math.inf)):
        problems.append(
            f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0, or None"
        )
    return problems


def _kind_problems(request: GenerationRequest) -> list[str]:
    """Look at what names the request and says how it is decoded."""
    problems: list[str] = []
    if not isinstance(request.prompt_id, str) or not request.prompt_id:
        problems.append(f"prompt_id is {request.prompt_id!r}; it must be a name")
    if not _is_integer(request.rollout, 0):
        problems.append(f"rollout is {request.rollout!r}; it must be an integer from 0 on")
    if not _is_integer(request.seed, 0) or request.seed >= 1 << 64:
        problems.append(f"seed is {request.seed!r}; it must be an unsigned 64-bit number")
    for name, given, kind in (
        ("mode", request.mode, DecodeMode),
        ("on_refusal", request.on_refusal, RefusalPolicy),
    ):
        if not isinstance(given, kind):
            options = " or ".join(f"{kind.__name__}.{member.name}" for member in kind)
            problems.append(f"{name} is {given!r}; it must be {options}")
    return problems


def _prompt_problems(request: GenerationRequest, model: ModelConfig) -> list[str]:
    prompt_ids = request.prompt_ids
    if not isinstance(prompt_ids, tuple):
        return [f"prompt_ids is of type {type(prompt_ids).__name__}; give a tuple of token ids"]
    if not prompt_ids:
        return ["the prompt is empty; give at least one token"]
    if set(map(type, prompt_ids)) != {int}:
        index, found = next((i, x) for i, x in enumerate(prompt_ids) if type(x) is not int)
        return [
            f"prompt_ids[{index}] is {found!r} of type {type(found).__name__}; "
            "token ids must be plain integers"
        ]
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.vocab_size:
        return [
            f"prompt ids reach from {min(prompt_ids)} to {max(prompt_ids)}, "
            f"the model has 0..{model.vocab_size - 1}; use the tokenizer of the model"
        ]
    return []


def _draw_problems(request: GenerationRequest) -> list[str]:
    """Look at what shapes the draw. Limits keep single precision finite, no more."""
    low, high = _FINITE
    problems: list[str] = []
    if request.temperature != 0.0 and not _is_within(request.temperature, low, high):
        problems.append(
            f"temperature is {request.temperature!r}; it must be 0 (greedy) or from {low} to {high}"
        )
    if not _is_integer(request.top_k, 0):
        problems.append(f"top_k is {request.top_k!r}; it must be an integer, 0 for all tokens")
    if not _is_within(request.top_p, 0.0, 1.0) or request.top_p == 0.0:
        problems.append(f"top_p is {request.top_p!r}; it must be above 0 and at most 1")
    if not _is_within(request.min_p, 0.0, 1.0):
        problems.append(f"min_p is {request.min_p!r}; it must be from 0 to 1")
    for name in ("repetition_penalty", "step_repetition_penalty"):
        penalty = getattr(request, name)
        if not _is_within(penalty, low, high):
            problems.append(
                f"{name} is {penalty!r}; it must be from {low} to {high}, 1 for no penalty"
            )
    return problems


def _room_problems(
    request: GenerationRequest, model: ModelConfig, config: EngineConfig
) -> list[str]:
    """Compare the budgets with the model's positions and with the whole pool."""
    problems: list[str] = []
    length = len(request.prompt_ids)
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


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_within(value: object, low: float, high: float) -> bool:
    """Whether ``value`` is a number, not NaN, from ``low`` to ``high``."""
    return isinstance(value, float | int) and not isinstance(value, bool) and low <= value <= high


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
