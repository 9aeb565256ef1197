"""From what a client asks to requests of the engine: prompts, budgets, seeds. Pure."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.engine.backends import slots_needed
from npr_megatron.engine.intake import request_problems
from npr_megatron.errors import InputError
from npr_megatron.records.randomness import derive_seed
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.serving.errors import ApiError
from npr_megatron.serving.wire import MAX_CHOICES, AnyAsked, ChatAsked, parse

_MAX_DEFAULT_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server answers with."""

    name: str
    """What clients call the model."""
    model: ModelConfig
    engine: EngineConfig
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that an answer may take."""

    total: int
    """Over all branches."""
    path: int
    """On the longest path."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked, ready for the engine."""

    asked: AnyAsked
    requests: tuple[GenerationRequest, ...]
    """One per choice, in the order of the choices."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        firsts = [request for request in self.requests if request.rollout == 0]
        return sum(len(request.prompt_ids) for request in firsts)


def order_of(
    kind: type[AnyAsked],
    fields: dict[str, Any],
    served: Served,
    order_id: str,
) -> Order:
    """Return what ``fields`` ask for.

    Args:
        order_id: names the requests; unique.

    Raises:
        ApiError: it cannot be served; lists every problem.
    """
    asked, problems = parse(kind, fields)
    problems += _draw_problems(fields, served)
    if asked is None:
        raise ApiError(400, "invalid_request", problems)
    if asked.model not in (None, served.name):
        raise ApiError(
            404,
            "model_not_found",
            [f"model {asked.model!r} is not served here; ask for {served.name!r}", *problems],
        )
    prompts, prompt_problems = _prompts(asked, served)
    budgets = [_budget(asked, prompt, served) for prompt in prompts]
    problems += prompt_problems + [text for text in budgets if isinstance(text, str)]
    num_choices = len(prompts) * asked.n
    if num_choices > MAX_CHOICES:
        problems.append(
            f"{len(prompts)} prompts with n = {asked.n} ask for {num_choices} choices; "
            f"ask for at most {MAX_CHOICES} at once"
        )
    if problems:
        is_long = problems == [text for text in budgets if isinstance(text, str)]
        code = "context_length_exceeded" if is_long else "invalid_request"
        raise ApiError(400, code, problems)
    firm = [budget for budget in budgets if isinstance(budget, Budget)]
    return Order(asked, _requests(asked, prompts, firm, order_id))


def _draw_problems(fields: dict[str, Any], served: Served) -> list[str]:
    """Return what the engine says of the numbers that shape the draw, whatever else is wrong."""
    probe = replace(
        _template(fields.get), prompt_id="-", prompt_ids=(0,), max_new_tokens=1, max_critical_path=1
    )
    return request_problems(probe, served.model, served.engine)


def _template(value_of: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt_id="",
        rollout=0,
        prompt_ids=(),
        mode=DecodeMode.PARALLEL,
        max_new_tokens=1,
        max_critical_path=1,
        seed=0,
        temperature=value_of("temperature", 1.0),
        top_p=value_of("top_p", 1.0),
        top_k=value_of("top_k", 0),
        min_p=value_of("min_p", 0.0),
        on_refusal=RefusalPolicy.SEQUENTIAL,
    )


def _prompts(asked: AnyAsked, served: Served) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return the ids of every prompt that has some, and one sentence for each that has none.

    The question of a conversation is put in the words the model was trained on; the prompt of a
    text completion is taken as it is.
    """
    prompts: list[tuple[int, ...]] = []
    problems: list[str] = []
    given: Sequence[Any] = [asked.messages] if isinstance(asked, ChatAsked) else asked.prompt
    for index, prompt in enumerate(given):
        try:
            ids = _ids_of(prompt, served)
        except InputError as error:
            problems.append(f"prompt {index}: {error}" if len(given) > 1 else str(error))
            continue
        if not ids or not 0 <= min(ids) <= max(ids) < served.model.vocab_size:
            problems.append(
                f"prompt {index} has no tokens, or ids outside 0..{served.model.vocab_size - 1}; "
                "give at least one token of the model's"
            )
            continue
        prompts.append(ids)
    return prompts, problems


def _ids_of(prompt: Any, served: Served) -> tuple[int, ...]:
    match prompt:
        case str():
            return tuple(served.tokenizer.encode(prompt))
        case [int(), *_]:
            return tuple(prompt)
    turns = [("system" if x.role == "developer" else x.role, x.content) for x in prompt]
    return PromptBuilder(served.tokenizer).conversation_ids(turns)


def _budget(asked: AnyAsked, prompt_ids: tuple[int, ...], served: Served) -> Budget | str:
    """Return the most tokens in total and on the longest path; or why there is no such answer.

    What the client asks for is firm; what it leaves open is what the model has room for.
    """
    length, num_positions = len(prompt_ids), served.model.max_position_embeddings
    room, slots = num_positions - length, _most_tokens(asked, prompt_ids, served)
    if min(room, slots) < 1:
        return (
            f"the prompt has {length} tokens; the model knows {num_positions} positions and the "
            f"server has {served.engine.num_kv_slots} KV slots, which leaves no room for an "
            "answer; shorten it"
        )
    total = asked.max_tokens
    if isinstance(asked, ChatAsked):
        total = total or asked.max_completion_tokens
    path = asked.npr.max_critical_path
    if total is None:
        total = min(num_positions // 2, _MAX_DEFAULT_TOKENS, slots)
        total = total if path is not None else min(total, room)
    if total > slots:
        return (
            f"max_tokens is {total}; behind a prompt of {length} tokens the server has room for "
            f"{slots}; ask for at most so many"
        )
    path = path or total
    if min(total, path) > room:
        return (
            f"the longest path may take {min(total, path)} tokens; behind a prompt of {length} "
            f"tokens the model has room for {room}; lower max_tokens or npr.max_critical_path"
        )
    return Budget(total, path)


def _most_tokens(asked: AnyAsked, prompt_ids: tuple[int, ...], served: Served) -> int:
    """Return how many tokens the engine can keep behind a prompt; 0 or less for none."""
    probe = replace(
        _template({}.get), prompt_ids=prompt_ids, mode=DecodeMode(asked.npr.mode), max_new_tokens=0
    )
    num_slots = served.engine.num_kv_slots
    return bisect_right(
        range(1, num_slots),
        num_slots,
        key=lambda total: slots_needed(replace(probe, max_new_tokens=total), served.engine),
    )


def _requests(
    asked: AnyAsked,
    prompts: Sequence[tuple[int, ...]],
    budgets: Sequence[Budget],
    order_id: str,
) -> tuple[GenerationRequest, ...]:
    template = _template(lambda name, default: getattr(asked, name, default))
    seed = secrets.randbits(64) if asked.seed is None else asked.seed
    return tuple(
        replace(
            template,
            prompt_id=f"{order_id}/{index}",
            rollout=sample,
            prompt_ids=prompt_ids,
            mode=DecodeMode(asked.npr.mode),
            max_new_tokens=budget.total,
            max_critical_path=budget.path,
            seed=derive_seed(seed, "serve", index, sample),
        )
        for index, (prompt_ids, budget) in enumerate(zip(prompts, budgets, strict=True))
        for sample in range(asked.n)
    )
