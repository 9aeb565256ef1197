"""``npr generate``: answer prompts with a trained model and watch how it reasons."""

from __future__ import annotations

from pathlib import Path

from npr_megatron.cli import generate_options as option
from npr_megatron.cli.answering import carry_out
from npr_megatron.cli.engine_options import Backend, BackendOption, DpSize, TpSize
from npr_megatron.cli.options import Json
from npr_megatron.cli.prompt_files import read_prompts
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.errors import InputError
from npr_megatron.pipeline.answer_order import AnswerOrder
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode


def generate(
    model_folder: option.ModelFolder,
    prompts: option.Prompts = None,
    file: option.PromptFile = None,
    output: option.Output = None,
    as_json: Json = False,
    mode: option.Mode = DecodeMode.PARALLEL,
    samples: option.Samples = 1,
    on_refusal: option.OnRefusal = RefusalPolicy.SEQUENTIAL,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    top_k: option.TopK = 0,
    min_p: option.MinP = 0.0,
    repetition_penalty: option.RepetitionPenalty = 1.0,
    step_repetition_penalty: option.StepRepetitionPenalty = 1.0,
    seed: option.Seed = 0,
    max_new_tokens: option.MaxNewTokens = None,
    timeout: option.Timeout = None,
    max_running: option.MaxRunning = 128,
    backend: BackendOption = Backend.EMBEDDED,
    tp_size: TpSize = 1,
    dp_size: DpSize = 1,
    device: option.Device = None,
    dtype: option.DtypeOption = None,
    weights: option.WeightsOption = option.Weights.AS_TRAINED,
) -> None:
    """Answer prompts with a trained model; in a terminal, watch the branches grow.

    Examples:

      npr generate runs/quickstart-seed0/stages/npr/hf "a:1+2+9;b:3+5+4;c:7+7+2?"

      npr generate MODEL_DIR --file problems.jsonl --output answers.jsonl

      npr generate MODEL_DIR "a:1+2?" --samples 4 --temperature 1 --top-p 0.95 --json

      echo "a:1+2?" | npr generate MODEL_DIR - --mode sequential

      torchrun --nproc-per-node 2 --no-python npr generate MODEL_DIR "a:1+2?"

    A prompt that cannot be answered (too long, or with signs the tokenizer does not know) is named
    and left out; the others are answered, and the exit code is 2.
    """
    asked = read_prompts(prompts or [], file)
    if samples > 1 and temperature == 0.0:
        raise InputError(
            f"{samples} samples at temperature 0 would be the same; add --temperature 1"
        )
    template = GenerationRequest(
        prompt_id="",
        rollout=0,
        prompt_ids=(),
        mode=mode,
        max_new_tokens=max_new_tokens or default_budget(model_folder),
        max_critical_path=1,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        step_repetition_penalty=step_repetition_penalty,
        on_refusal=on_refusal,
        timeout_s=timeout,
    )
    order = AnswerOrder(
        model_folder=model_folder,
        questions={prompt.name: prompt.text for prompt in asked},
        template=template,
        num_samples=samples,
        is_budget_firm=max_new_tokens is not None,
        backend=backend.value,
        tp_size=tp_size,
        dp_size=dp_size,
        device=device,
        dtype=None if dtype is None else dtype.value,
        weights=weights.value,
        max_running=max_running,
    )
    carry_out(order, output=output, as_json=as_json)


def default_budget(model_folder: Path) -> int:
    """Return half of the positions the model knows, the rest being for the prompt; at most
    8,192."""
    return min(read_trainable_architecture(model_folder).max_position_embeddings // 2, 8192)
