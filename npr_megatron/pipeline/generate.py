"""Answer prompts with an exported model, in this process, and tell what happens as it happens."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.tokenizer import TextStream, Tokenizer, load_tokenizer
from npr_megatron.engine.backends import slots_needed
from npr_megatron.engine.events import Event, FinishEvent, RestartEvent, TokenEvent
from npr_megatron.engine.intake import request_problems
from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.pipeline.answer_order import AnswerOrder
from npr_megatron.pipeline.local_engine import local_engine
from npr_megatron.records.randomness import derive_seed
from npr_megatron.records.request import GenerationRequest
from npr_megatron.runtime.device import device_type

_MAX_POOL_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What can be decoded, and what cannot."""

    model_folder: Path
    tokenizer: Tokenizer
    requests: Sequence[GenerationRequest]
    refusals: Sequence[str]
    """One line for each problem of each prompt that was refused."""
    num_refused: int
    """Prompts that were refused."""
    device: torch.device | None
    """None takes the one of this process."""
    engine: EngineConfig


def prepare(order: AnswerOrder) -> Task:
    """Turn questions into requests, and find every prompt that cannot be served. Reads no weights.

    Raises:
        InputError: no usable model or tokenizer in the folder, or no such device.
        EnvironmentFault: this machine does not have the device.
    """
    model = read_trainable_architecture(order.model_folder)
    device = find_device(order.device)
    engine = EngineConfig(
        dtype=order.dtype or ("bf16" if is_cuda(device) else "fp32"),
        backend=order.backend,
        tp_size=order.tp_size,
        sglang=SglangConfig(dp_size=order.dp_size),
        weights=order.weights,
        max_running=order.max_running,
    )
    tokenizer = load_tokenizer(order.model_folder, max_plans=engine.max_plans)
    prompts = PromptBuilder(tokenizer)
    requests: list[GenerationRequest] = []
    refused: dict[str, list[str]] = {}
    for name, question in order.questions.items():
        try:
            prompt_ids = prompts.prompt_ids(Problem(id=name, question=question, answer=""))
        except InputError as error:
            refused[name] = [str(error)]
            continue
        samples = _samples(order, name, prompt_ids, model)
        problems = request_problems(samples[0], model, _with_room(engine, samples[:1]))
        if problems:
            refused[name] = problems
        else:
            requests += samples
    return Task(
        model_folder=order.model_folder,
        tokenizer=tokenizer,
        requests=requests,
        refusals=[f"{name}: {problem}" for name, why in refused.items() for problem in why],
        num_refused=len(refused),
        device=device,
        engine=_with_room(engine, requests),
    )


def answer(task: Task, requests: Sequence[GenerationRequest]) -> Iterator[tuple[Event, str]]:
    """Decode ``requests`` of ``task``; yield every event with the text that a token adds.

    Requests go to the engine as others end, so that the timeout of each begins when it can run.
    Nothing is yielded in processes that compute for another one (see ``pipeline.local_engine``).

    Raises:
        InputError: the folder holds no weights of the model.
        EnvironmentFault: a process is gone or silent.
    """
    config, vocabulary = task.engine, task.tokenizer.vocabulary
    with local_engine(task.model_folder, config, vocabulary, device=task.device) as engine:
        if engine is None:
            return
        events: list[Event] = []
        texts = _Texts(task.tokenizer)
        waiting = deque(requests)
        while waiting or engine.num_unfinished:
            while waiting and engine.num_unfinished < config.max_running:
                engine.add(waiting.popleft(), listener=events.append)
            engine.step()
            for event in events:
                yield event, texts.of(event)
            events.clear()


class _Texts:
    """The text of every stream under way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, dict[tuple[int, int], TextStream]] = {}

    def of(self, event: Event) -> str:
        match event:
            case TokenEvent():
                streams = self._streams.setdefault(event.request_id, {})
                place = (event.block, event.branch)
                if place not in streams:
                    streams[place] = TextStream(self._tokenizer)
                return streams[place].add(event.token_id)
            case FinishEvent() | RestartEvent():
                self._streams.pop(event.request_id, None)
        return ""


def _samples(
    order: AnswerOrder, name: str, prompt_ids: tuple[int, ...], model: ModelConfig
) -> list[GenerationRequest]:
    template = order.template
    budget = template.max_new_tokens
    if not order.is_budget_firm:
        budget = max(min(budget, model.max_position_embeddings - len(prompt_ids)), 1)
    return [
        replace(
            template,
            prompt_id=name,
            rollout=sample,
            prompt_ids=prompt_ids,
            max_new_tokens=budget,
            max_critical_path=budget,
            seed=derive_seed(template.seed, "generate", name, sample),
        )
        for sample in range(order.num_samples)
    ]


def _with_room(engine: EngineConfig, requests: Sequence[GenerationRequest]) -> EngineConfig:
    """Return ``engine`` with a pool for the largest requests that run at once, within reason."""
    needs = [slots_needed(request, engine) for request in requests]
    largest = heapq.nlargest(engine.max_running, needs)
    num_slots = max(min(sum(largest), _MAX_POOL_TOKENS), *largest[:1], 1)
    return engine.model_copy(update={"num_kv_slots": num_slots})


def is_cuda(device: torch.device | None) -> bool:
    return (device_type() if device is None else device.type) == "cuda"


def find_device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"the device is {name}; name cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the device is {name}; name cpu, cuda or cuda:1")
    num_found = torch.cuda.device_count() if device.type == "cuda" else 1
    if num_found <= (device.index or 0):
        raise EnvironmentFault(
            f"device {name} was asked for, {num_found} CUDA devices were found; leave --device out"
        )
    return device
