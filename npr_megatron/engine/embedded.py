"""The engine that computes in its own process: continuous batching in torch on one device.

One ``step`` admits what fits, inserts forced tokens, runs the model once over everything ragged
(pieces of prompts, forced runs, single tokens), samples all streams together and hands each its
token. Weights change only between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute.runner import LocalRunner, Runner
from npr_megatron.engine.decode import decode, recompute
from npr_megatron.engine.events import Event, Watcher
from npr_megatron.engine.flow.flow import Flow, Teacher
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.intake import refusals
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.live_weights import LiveWeights
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.scheduler import Scheduler
from npr_megatron.engine.schedule.tree import Tree
from npr_megatron.engine.stats import EngineStats
from npr_megatron.errors import InputError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason, FloatArray, Trajectory
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.tags import Vocabulary


class EmbeddedEngine(Engine):
    """Decodes requests under live weights.

    Args:
        model: architecture; ``max_position_embeddings`` bounds prompt and critical path together.
        config: pool size, concurrency, dtype.
        vocabulary: ids of tags and of the end token; its index ids beyond ``config.max_plans`` are
            not used.
        device: where storages and cache live.
        runner: runs the batches; one device of this process by default.
        clock: seconds, for the timeouts of requests.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        vocabulary: Vocabulary,
        *,
        device: str | torch.device = "cpu",
        runner: Runner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._config = config
        self._grammar = Grammar(
            replace(vocabulary, index_ids=vocabulary.index_ids[: config.max_plans])
        )
        self._runner = runner or LocalRunner(model, config, device)
        self._clock = clock
        self._pool = SlotPool(config.num_kv_slots)
        self._scheduler = Scheduler(self._pool, config)
        self._trees: dict[str, Tree] = {}
        """Every unfinished request."""
        self._num_steps = 0
        self._ended: list[Tree] = []
        """Ended between two steps; the next one returns them."""
        self._deadlines: dict[str, float] = {}
        self._watchers: dict[str, tuple[Watcher, Callable[[Event], None]]] = {}
        self._live = LiveWeights(self._runner.weights, self._runner.agree)

    # Requests

    @property
    def unfinished(self) -> Collection[str]:
        """Ids of the requests that a later ``step`` will return."""
        return self._trees.keys()

    @property
    def progress(self) -> int:
        """Steps so far: each advances every running request."""
        return self._num_steps

    def stats(self) -> EngineStats:
        """Return what the engine holds and has done."""
        scheduler = self._scheduler
        num_idle = scheduler.prefixes.idle_slots
        return EngineStats.of(
            scheduler.counts,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_kv_slots_held=self._pool.num_slots - self._pool.num_free - num_idle,
            num_kv_slots_idle=num_idle,
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless every slot is free or held by one owner, who needs it."""
        self._pool.check_integrity()
        self._scheduler.check_integrity()

    def problems(self, request: GenerationRequest) -> list[str]:
        """Return one sentence for each reason why ``add`` would refuse ``request``."""
        return refusals(request, self._model, self._config, self.unfinished)

    def add(
        self,
        request: GenerationRequest,
        teacher: Teacher | None = None,
        listener: Callable[[Event], None] | None = None,
    ) -> None:
        """Queue a request; see :meth:`Engine.add`."""
        if problems := self.problems(request):
            raise InputError("\n".join(problems))
        flow = Flow(request, self._grammar, self._grammar.vocabulary.eos, teacher)
        self._trees[request.request_id] = self._scheduler.submit(flow)
        if request.timeout_s is not None:
            self._deadlines[request.request_id] = self._clock() + request.timeout_s
        if listener is not None:
            self._watchers[request.request_id] = (Watcher(), listener)

    def abort(self, request_id: str) -> None:
        """End a request; see :meth:`Engine.abort`."""
        self._end(self._tree(request_id, "aborted"), FinishReason.ABORTED)

    def preempt(self, request_id: str) -> None:
        """Take the slots of a running request; see :meth:`Engine.preempt`."""
        tree = self._tree(request_id, "preempted")
        if tree in self._scheduler.running and tree.flow.finish is None:
            self._scheduler.preempt(tree)

    @torch.inference_mode()
    def step(self) -> list[Trajectory]:
        """Advance the running trajectories by up to one token per stream; return those that ended.

        Raises:
            StaleWeightsError: no weights were loaded.
        """
        self._require_weights()
        self._end_overdue()
        plan = self._scheduler.plan()
        lost = decode(plan, self._pool, self._runner, self.weight_version)
        self._num_steps += 1
        if lost:
            self._fail(lost)
        ended, self._ended = self._ended + self._drop_finished(), []
        if self._config.debug_checks:
            self.check_integrity()
        self._tell()
        for tree in ended:
            request_id = tree.flow.request.request_id
            del self._trees[request_id]
            self._deadlines.pop(request_id, None)
            self._watchers.pop(request_id, None)
        return [tree.flow.trajectory(tree.routed_experts) for tree in ended]

    @torch.inference_mode()
    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return log-probs under the live weights, by one masked pass; see :meth:`Engine.score`."""
        self._require_weights()
        return self._runner.score(trajectories)

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
        """Replace all weights at once; see :meth:`Engine.load`."""
        self._live.load(weights, version)
        self._go_on()

    def staging(self) -> dict[str, Tensor]:
        """Return the shadow storages; see :meth:`Engine.staging`."""
        return self._live.staging()

    def seal(self) -> None:
        """Check what was staged beforehand; see :meth:`Engine.seal`."""
        self._live.seal()

    def commit(self, version: int) -> None:
        """Make the staged weights live, in place; see :meth:`Engine.commit`."""
        self._live.commit(version)
        self._go_on()

    @torch.inference_mode()
    def _go_on(self) -> None:
        """Carry the trajectories under way over to the live weights."""
        match self._config.kv_after_push:
            case "drop":
                self._scheduler.start_again(self.weight_version)
            case "recompute":
                feeds = self._scheduler.renew(self.weight_version)
                recompute(feeds, self._pool, self._runner, self._config.max_step_tokens)
            case "keep":
                self._scheduler.enter(self.weight_version)

    def _require_weights(self) -> None:
        if self.weight_version < 0:
            raise StaleWeightsError(
                "the engine was asked to compute, but holds no weights; "
                "call load, or staging and commit"
            )

    def close(self) -> None:
        """Nothing outlives the object: memory goes with it."""

    # Between two steps

    def _tree(self, request_id: str, what: str) -> Tree:
        tree = self._trees.get(request_id)
        if tree is None:
            raise InputError(
                f"request {request_id} was to be {what}, but it is none of the {len(self._trees)} "
                "unfinished ones; name a request that was added and not yet returned"
            )
        return tree

    def _end(self, tree: Tree, reason: FinishReason) -> None:
        if tree.flow.finish is not None:
            return
        tree.flow.finish = reason
        if tree in self._scheduler.waiting:
            self._scheduler.drop_waiting(tree)
            self._ended.append(tree)
        else:
            self._ended += self._drop_finished()

    def _drop_finished(self) -> list[Tree]:
        """Release what has ended, and keep of its memory what the trajectories record."""
        if self._config.record_routes:
            for tree in self._scheduler.finished:
                if not tree.is_filling:  # its slots are another's still
                    tree.routed_experts = self._runner.routes(tree.token_slots(self._pool))
        return self._scheduler.drop_finished()

    def _fail(self, lost: Sequence[Segment]) -> None:
        """End the trajectories of segments without a distribution; the others go on."""
        names = {id(segment) for segment in lost}
        for tree in self._scheduler.running:
            flow = tree.flow
            if not names.isdisjoint(map(id, flow.segments)):
                flow.finish = FinishReason.FAILED
                flow.finish_detail = f"log-probs under weight version {self.weight_version} are NaN"
        self._scheduler.distrust_prompts()

    def _end_overdue(self) -> None:
        if self._deadlines:
            now = self._clock()
            for request_id, deadline in self._deadlines.items():
                if now >= deadline:
                    self._end(self._trees[request_id], FinishReason.TIMEOUT)

    def _tell(self) -> None:
        for request_id, (watcher, listener) in list(self._watchers.items()):
            for event in watcher.news(self._trees[request_id].flow, self.weight_version):
                listener(event)
