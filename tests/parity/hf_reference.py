"""The oracle of engine parity: transformers' model on the linear form of a response.

Positions, labels, masks and predecessors come from the texts a response was rendered from
(``tests.unit.topology.oracles``) and from the rule in words, not from the code under test; what the
engine recorded serves as token ids only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from npr_megatron.config.model import ModelConfig
from npr_megatron.records.trajectory import BoolArray, IntArray
from tests.structures import WORDS, Structure
from tests.unit.topology.oracles import Token, paper_positions, program_of, walk

MASK_ELEMENTS = 1 << 21
"""Most entries of the masks of one pass: bounds memory, not results."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearForm:
    """Aligned [T] streams of a prompt and its response, as the oracle sees them."""

    token_ids: IntArray
    position_ids: IntArray
    block: IntArray
    branch: IntArray
    predecessor: IntArray
    """Index of the token whose logits predict this one; -1 in the prompt and where none does."""
    is_forced: BoolArray

    @property
    def predicted(self) -> IntArray:
        """Indices of the tokens that something predicts."""
        return np.flatnonzero(self.predecessor >= 0).astype(np.int32)

    @property
    def is_word(self) -> BoolArray:
        """[T] True where a word is the model's to choose."""
        return np.isin(self.token_ids, WORDS) & ~self.is_forced


def linear_form(structure: Structure) -> LinearForm:
    """Place every token of a structure by the recursive walk over its texts."""
    tokens, _ = walk(program_of(structure))
    predecessor = predictors(tokens)
    predecessor[: structure.prompt_length] = -1
    return LinearForm(
        token_ids=np.array([token.token_id for token in tokens], np.int32),
        position_ids=np.array([token.position for token in tokens], np.int32),
        block=np.array([token.block for token in tokens], np.int32),
        branch=np.array([token.branch for token in tokens], np.int32),
        predecessor=predecessor,
        is_forced=np.array([token.is_forced for token in tokens]),
    )


def plain_form(token_ids: Sequence[int] | IntArray, prompt_length: int) -> LinearForm:
    """Causal text."""
    length = len(token_ids)
    zeros, offsets = np.zeros(length, np.int32), np.arange(length, dtype=np.int32)
    return LinearForm(
        token_ids=np.asarray(token_ids, np.int32),
        position_ids=offsets,
        block=zeros,
        branch=zeros,
        predecessor=np.where(offsets < prompt_length, -1, offsets - 1).astype(np.int32),
        is_forced=offsets < prompt_length,
    )


def predictors(tokens: Sequence[Token]) -> IntArray:
    """In words: the token before on the same stream; the trunk goes on in the first branch only;
    nothing predicts the head of another branch, nor the trunk behind a join.
    """
    found = [-1]
    for index, (before, token) in enumerate(pairwise(tokens)):
        is_same_stream = (before.block, before.branch) == (token.block, token.branch)
        is_first_branch = before.branch == 0 and token.branch == 1
        found.append(index if is_same_stream or is_first_branch else -1)
    return np.array(found, np.int32)


def sees_tree(form: LinearForm) -> BoolArray:
    """[T, T] query by key: nothing later, and no sibling branch of one's own block."""
    block, branch = form.block, form.branch
    in_one_block = (block[:, None] == block) & (block > 0)
    is_sibling = in_one_block & (branch[:, None] != branch)
    return sees_all(form) & ~is_sibling


def sees_all(form: LinearForm) -> BoolArray:
    """[T, T] plain causal text: what a sibling-visible engine would read."""
    return np.tri(len(form.token_ids), dtype=np.bool_)


def with_flat_positions(form: LinearForm) -> LinearForm:
    """Numbered through, as if branches stood one behind the other."""
    offsets = np.arange(len(form.token_ids), dtype=np.int32)
    return dataclasses.replace(form, position_ids=offsets)


def with_paper_positions(form: LinearForm, structure: Structure) -> LinearForm:
    """Shifted by one at every fork and join, as published."""
    positions = paper_positions(
        form.token_ids.tolist(), structure.prompt_length, structure.vocabulary
    )
    return dataclasses.replace(form, position_ids=np.array(positions, np.int32))


def hf_model(model: ModelConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Split the engine's fused storages into the parameters of the reference model."""
    reference = _untrained(model)
    head = model.head_dim
    rows_q, rows_kv = model.num_attention_heads * head, model.num_key_value_heads * head
    state = {}
    for name, tensor in weights.items():
        match name.split(".")[-2]:
            case "qkv_proj":
                parts = zip("qkv", tensor.split((rows_q, rows_kv, rows_kv)), strict=True)
                for part, rows in parts:
                    state["model." + name.replace("qkv_proj", f"self_attn.{part}_proj")] = rows
            case "gate_up_proj":
                for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                    state["model." + name.replace("gate_up_proj", f"mlp.{part}_proj")] = rows
            case "o_proj" | "q_norm" | "k_norm" as part:
                state["model." + name.replace(part, f"self_attn.{part}")] = tensor
            case "down_proj" | "gate" as part:
                state["model." + name.replace(part, f"mlp.{part}")] = tensor
            case "experts":
                matrix = "gate_up_proj" if name.endswith("w13_weight") else "down_proj"
                state[f"model.{name.rsplit('.', 2)[0]}.mlp.experts.{matrix}"] = tensor
            case "lm_head":
                state[name] = tensor
            case _:
                state["model." + name] = tensor
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tie_word_embeddings else [])
    return reference


def _untrained(model: ModelConfig) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    experts = {}
    if model.moe is not None:
        experts = model.moe.model_dump(exclude={"num_dense_layers"}) | {
            "mlp_only_layers": [*range(model.moe.num_dense_layers)],
            "norm_topk_prob": True,
            "experts_implementation": "eager",
        }
    config = AutoConfig.for_model(
        model.family,
        **model.model_dump(exclude={"family", "rope_theta", "rope_scaling", "moe"}),
        **experts,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    return AutoModelForCausalLM.from_config(config).eval()


def oracle_logprobs(
    reference: PreTrainedModel,
    forms: Sequence[LinearForm],
    sees: Callable[[LinearForm], BoolArray] = sees_tree,
) -> list[torch.Tensor]:
    """Return [T, V] log-probs after each token of each form; forms of like lengths run together."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(forms)
    for indices in _buckets([len(form.token_ids) for form in forms]):
        rows = [forms[index] for index in indices]
        length = max(len(row.token_ids) for row in rows)
        streams = torch.zeros((2, len(rows), length), dtype=torch.int64)
        visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding: itself
        for number, row in enumerate(rows):
            size = len(row.token_ids)
            streams[:, number, :size] = torch.tensor(np.stack([row.token_ids, row.position_ids]))
            visible[number, :size, :size] = torch.from_numpy(sees(row))
        with torch.inference_mode():
            logits = reference(
                input_ids=streams[0],
                position_ids=streams[1],
                attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None],
                use_cache=False,
            ).logits
        for index, row, scores in zip(indices, rows, logits.log_softmax(-1), strict=True):
            found[index] = scores[: len(row.token_ids)]
    return found


def _buckets(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices by length, as many together as the masks may hold."""
    bucket: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if bucket and (len(bucket) + 1) * lengths[index] ** 2 > MASK_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(index)
    if bucket:
        yield bucket
