"""Answer prompts with an exported model, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npr_megatron.config.engine import EngineConfig
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.pipeline.local_engine import open_engine
from npr_megatron.records.randomness import derive_seed
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, Trajectory


def generate(
    model_folder: Path,
    questions: Sequence[str],
    *,
    mode: DecodeMode,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    engine: EngineConfig,
) -> list[tuple[Trajectory, list[str]]]:
    """Return one trajectory per question with the text of each of its tokens.

    Raises:
        InputError: no usable model or tokenizer in ``model_folder``, or a question it cannot spell.
    """
    tokenizer = load_tokenizer(model_folder, max_plans=engine.max_plans)
    prompts = PromptBuilder(tokenizer)
    requests = [
        GenerationRequest(
            prompt_id=f"question/{number}",
            rollout=0,
            prompt_ids=prompts.prompt_ids(Problem(id=str(number), question=question, answer="")),
            mode=mode,
            max_new_tokens=max_new_tokens,
            max_critical_path=max_new_tokens,
            seed=derive_seed(seed, "generate", number),
            temperature=temperature,
        )
        for number, question in enumerate(questions)
    ]
    trajectories = open_engine(model_folder, engine, tokenizer.vocabulary).generate(requests)
    return [(item, tokenizer.pieces(item.token_ids)) for item in trajectories]
