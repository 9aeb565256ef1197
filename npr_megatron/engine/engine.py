"""NPR Engine: decodes trajectories, sequential or branch-parallel, by continuous batching on one
device.

Example::

    engine = Engine(model, EngineConfig(), vocabulary)
    engine.load(weights)
    trajectories = engine.generate(requests)

One ``step`` admits what fits, inserts forced tokens, runs the model once over everything ragged
(prompts, forced runs, single tokens), samples all streams together and hands each its token.
Weights change only between steps.

The engine is single threaded and knows nothing of Ray, tokenizers or text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.attention import PooledAttention
from npr_megatron.engine.batch import RaggedBatch, assemble
from npr_megatron.engine.flow import Flow, Stream, Teacher
from npr_megatron.engine.intake import request_problems
from npr_megatron.engine.live_weights import LiveWeights
from npr_megatron.engine.model import EngineModel
from npr_megatron.engine.pool import SlotPool
from npr_megatron.engine.sampler import SamplingRows, draw, policy_logprobs
from npr_megatron.engine.scheduler import Scheduler
from npr_megatron.engine.scoring import score
from npr_megatron.engine.segment import Feed
from npr_megatron.errors import DivergenceError, InputError, StaleWeightsError
from npr_megatron.records.randomness import uniforms
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason, FloatArray, Trajectory
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.storages import DTYPES

_FEED_TOKENS = 1024
"""Longest feed per pass; longer prompts run in pieces."""
_REFILL_FEEDS = 16
"""Trees recomputed per pass after a commit. Both bound memory, not results."""


class Engine:
    """Decodes requests under live weights.

    Args:
        model: architecture; ``max_position_embeddings`` bounds prompt and critical path together.
        config: pool size, concurrency, dtype.
        vocabulary: ids of tags and of the end token; its index ids beyond ``config.max_plans`` are
            not used.
        device: where storages and cache live.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        vocabulary: Vocabulary,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self._config = config
        self._grammar = Grammar(
            replace(vocabulary, index_ids=vocabulary.index_ids[: config.max_plans])
        )
        self._model = EngineModel(
            model,
            num_slots=config.num_kv_slots,
            dtype=DTYPES[config.dtype],
            device=torch.device(device),
        )
        self._pool = SlotPool(config.num_kv_slots)
        self._scheduler = Scheduler(self._pool, config.max_running)
        self._flows: dict[str, Flow] = {}
        self._aborted: list[Flow] = []
        self._live = LiveWeights(self._model.weights)

    # Requests

    @property
    def num_unfinished(self) -> int:
        """Trajectories that a later ``step`` will return."""
        return len(self._flows)

    @property
    def num_kv_slots_used(self) -> int:
        """Resident keys and values [tokens], prompts included."""
        return self._pool.num_slots - self._pool.num_free

    def add(self, request: GenerationRequest, teacher: Teacher | None = None) -> None:
        """Queue a request.

        Args:
            teacher: overrides sampled tokens by (block, branch, index in the stream), or keeps them
                with None; log-probs stay those of the model. For replaying known trajectories,
                tests and benchmarks.

        Raises:
            InputError: the request can never be served; lists every reason.
        """
        problems = request_problems(request, self._model.config, self._config)
        if request.request_id in self._flows:
            problems.append(
                "a request of this id is unfinished; wait for it or use another rollout"
            )
        if problems:
            raise InputError("\n".join(f"request {request.request_id}: {x}" for x in problems))
        flow = Flow(request, self._grammar, self._grammar.vocabulary.eos, teacher)
        self._flows[request.request_id] = flow
        self._scheduler.submit(flow)

    def abort(self, request_id: str) -> None:
        """End a request; the next ``step`` returns what it has generated, finished as ABORTED.

        Raises:
            InputError: no unfinished request has this id.
        """
        flow = self._flows.get(request_id)
        if flow is None:
            raise InputError(
                f"request {request_id} was to be aborted, but it is none of the {len(self._flows)} "
                "unfinished ones; abort a request once, before it is returned"
            )
        if flow.finish is not None:
            return
        if flow in self._scheduler.waiting:
            self._scheduler.drop_waiting(flow)
            self._aborted.append(flow)
        flow.finish = FinishReason.ABORTED

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_finish: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decode ``requests`` and return their trajectories in the same order.

        Args:
            on_finish: called with each trajectory as soon as it ends.

        Raises:
            InputError: a request is refused, or earlier ones are unfinished; nothing was decoded.
        """
        if self._flows:
            raise InputError(
                f"generate was called with {len(self._flows)} requests unfinished; "
                "drain them with step()"
            )
        try:
            for request in requests:
                self.add(request)
        except InputError:
            for flow in self._flows.values():
                self._scheduler.drop_waiting(flow)
            self._flows.clear()
            raise
        finished: dict[str, Trajectory] = {}
        while self.num_unfinished:
            for trajectory in self.step():
                finished[f"{trajectory.prompt_id}#{trajectory.rollout}"] = trajectory
                if on_finish is not None:
                    on_finish(trajectory)
        return [finished[request.request_id] for request in requests]

    @torch.inference_mode()
    def step(self) -> list[Trajectory]:
        """Advance every running trajectory by one token per stream; return those that ended.

        Raises:
            StaleWeightsError: no weights were loaded.
            DivergenceError: the weights give NaN; the engine is of no further use.
        """
        self._require_weights()
        finished = self._aborted + self._scheduler.drop_finished()
        self._aborted = []
        feeds = self._run_ahead(self._scheduler.admit())
        streams: list[Stream] = []
        for flow in self._scheduler.running:
            # A stream opened by expand is fed by its feed, not as a single token: take the list
            # from before.
            decoding = flow.decoding
            feeds += flow.expand(self._pool, self.weight_version)
            if flow.finish is None:
                streams += decoding
        if streams or feeds:
            self._decode(assemble(streams, feeds, self._pool, self._model.device))
        finished += self._scheduler.drop_finished()
        if self._config.debug_checks:
            self._pool.check_integrity()
        for flow in finished:
            del self._flows[flow.request.request_id]
        return [flow.trajectory() for flow in finished]

    @torch.inference_mode()
    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] fp32 log-probs under the live weights, by one masked pass.

        Positions and branches are those recorded; 0.0 on the prompt and where nothing predicts a
        token.

        Raises:
            StaleWeightsError: no weights were loaded.
        """
        self._require_weights()
        return score(self._model, trajectories)

    # Weights

    @property
    def weights(self) -> dict[str, Tensor]:
        """Live storages by name. Read them; to change them use ``load`` or ``staging`` and
        ``commit``.
        """
        return self._live.storages

    @property
    def weight_version(self) -> int:
        """Version of the live weights; -1 until some are loaded."""
        return self._live.version

    def load(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Replace all weights at once; trajectories go on as after :meth:`commit`.

        Raises:
            LayoutError: a storage is missing, unknown or of another shape; nothing was replaced.
            DivergenceError: a storage holds NaN or infinity; nothing was replaced.
        """
        self._live.load(weights, version)
        self._go_on()

    def staging(self) -> dict[str, Tensor]:
        """Return the shadow storages: same names and shapes, filled by the caller while decoding
        goes on.
        """
        return self._live.staging()

    def seal(self) -> None:
        """Check what was staged beforehand, so that ``commit`` takes no longer than a copy.

        Call it when the shadow storages are filled, from the thread that filled them.

        Raises:
            DivergenceError: a storage holds NaN or infinity; fill ``staging()`` anew.
        """
        self._live.seal()

    def commit(self, version: int) -> None:
        """Make the staged weights live, in place, and stamp later tokens with ``version``.

        Unfinished trajectories go on as ``EngineConfig.kv_after_push`` says: from their prompts
        (``drop``); from their text, with keys and values of the new weights, so that later tokens
        are those of the new policy given the same text (``recompute``); or from their text with the
        keys and values they have (``keep``).

        Raises:
            StaleWeightsError: nothing was staged, or ``version`` is not newer than the live one.
            DivergenceError: what was staged holds NaN or infinity. Nothing has changed then.
        """
        self._live.commit(version)
        self._go_on()

    def _go_on(self) -> None:
        """Carry the trajectories under way over to the live weights."""
        match self._config.kv_after_push:
            case "drop":
                self._start_again()
            case "recompute":
                self._scheduler.renew(self.weight_version)
                self._refill()
            case "keep":
                self._scheduler.enter(self.weight_version)

    def _start_again(self) -> None:
        self._aborted += self._scheduler.drop_finished()  # returned by the next step, as they are
        for flow in self._scheduler.start_again(self.weight_version):
            self._flows[flow.request.request_id] = flow

    @torch.inference_mode()
    def _refill(self) -> None:
        """Recompute every key and value in the pool in place; slots, rows and tokens stay."""
        scheduler, pool = self._scheduler, self._pool
        prefixes = [prefix.refill(pool) for prefix in scheduler.resident_prefixes]
        trees = [flow.refill(pool) for flow in scheduler.running]
        for feeds in (prefixes, trees):
            feeds = [feed for feed in feeds if len(feed.token_ids)]
            for start in range(0, len(feeds), _REFILL_FEEDS):
                self._forward(self._run_ahead(feeds[start : start + _REFILL_FEEDS]))

    def _require_weights(self) -> None:
        if self.weight_version < 0:
            raise StaleWeightsError(
                "the engine was asked to compute, but holds no weights; "
                "call load, or staging and commit"
            )

    # One pass

    def _run_ahead(self, feeds: Sequence[Feed]) -> list[Feed]:
        """Run all but the last piece of long feeds, one pass each; return what is left."""
        rest: list[Feed] = []
        for feed in feeds:
            *ahead, last = feed.split(_FEED_TOKENS)
            for piece in ahead:
                self._forward([piece])
            rest.append(last)
        return rest

    def _forward(self, feeds: Sequence[Feed]) -> None:
        """Fill the slots of ``feeds``; their logits are not wanted."""
        self._hidden(assemble([], feeds, self._pool, self._model.device))

    def _hidden(self, batch: RaggedBatch) -> Tensor:
        attend = PooledAttention(self._model.kv_cache, batch.slots, batch.groups)
        return self._model.hidden(batch.token_ids, batch.position_ids, attend)

    def _decode(self, batch: RaggedBatch) -> None:
        """Run the model, record the log-probs of forced tokens, sample, and hand each stream its
        token.
        """
        hidden = self._hidden(batch).index_select(0, batch.logit_index)
        logprobs_MV = policy_logprobs(self._model.logits(hidden))
        # One NaN logit makes a whole row NaN, so one column tells.
        if bool(logprobs_MV[:, 0].isnan().any()):
            raise DivergenceError(
                f"a step under weight version {self.weight_version} gave log-probs of which some "
                "are NaN; check the pushed weights, then open a new engine"
            )
        num_sampled = len(batch.sampled)
        tokens = _choose(logprobs_MV[:num_sampled], batch.sampled)
        known = [segment.token_ids[index] for segment, index in batch.scored]
        labels_M = torch.tensor(tokens + known, dtype=torch.int64).to(logprobs_MV.device)
        logprobs = logprobs_MV.gather(-1, labels_M[:, None])[:, 0].tolist()
        for (segment, index), logprob in zip(batch.scored, logprobs[num_sampled:], strict=True):
            segment.logprobs[index] = logprob
        version = self.weight_version
        for stream, token_id, logprob in zip(batch.sampled, tokens, logprobs, strict=False):
            # A sibling earlier in this step may have ended the trajectory.
            if stream.flow.finish is None:
                stream.flow.accept(stream, token_id, logprob, version)


def _choose(logprobs_MV: Tensor, streams: Sequence[Stream]) -> list[int]:
    """Return one token per stream: sampled under its request, or its teacher's."""
    if not streams:
        return []
    requests = [stream.flow.request for stream in streams]
    rows = SamplingRows(
        temperature=np.array([request.temperature for request in requests]),
        top_p=np.array([request.top_p for request in requests]),
        uniforms=uniforms(
            np.array([stream.key for stream in streams], dtype=np.uint64),
            np.array([stream.index for stream in streams], dtype=np.uint64),
        ),
    )
    tokens: list[int] = draw(logprobs_MV, rows).tolist()
    for row, stream in enumerate(streams):
        if stream.flow.teacher is not None:
            segment = stream.segment
            taught = stream.flow.teacher(segment.block, segment.branch, stream.index)
            tokens[row] = tokens[row] if taught is None else taught
    return tokens
