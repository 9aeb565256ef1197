"""What every NPR Engine does, whoever computes: ``embedded`` in this process, or ``sglang``.

Example::

    engine = EmbeddedEngine(model, EngineConfig(), vocabulary)
    engine.load(weights)
    trajectories = engine.generate(requests)

An engine belongs to one thread: whoever calls ``step`` calls everything else, with one exception:
``staging`` and ``seal`` may be used by another thread while steps run. Requests and trajectories
are ids; engines know nothing of text, tokenizers or Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor

from npr_megatron.engine.events import Event
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.stats import EngineStats
from npr_megatron.errors import InputError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FloatArray, Trajectory


class Engine(ABC):
    """Decodes trajectories, sequential or branch-parallel, under live weights."""

    # Requests

    @property
    @abstractmethod
    def unfinished(self) -> Collection[str]:
        """Ids of the requests that a later ``step`` will return."""

    @property
    def num_unfinished(self) -> int:
        """Trajectories that a later ``step`` will return."""
        return len(self.unfinished)

    @property
    @abstractmethod
    def progress(self) -> int:
        """Grows whenever unfinished requests advance; who sees it stand still may give up."""

    @abstractmethod
    def problems(self, request: GenerationRequest) -> list[str]:
        """Return one sentence for each reason why ``add`` would refuse ``request``."""

    @abstractmethod
    def add(
        self,
        request: GenerationRequest,
        teacher: Teacher | None = None,
        listener: Callable[[Event], None] | None = None,
    ) -> None:
        """Queue a request.

        Args:
            teacher: overrides sampled tokens by (block, branch, index in the stream), or keeps them
                with None; log-probs stay those of the model. For replaying known trajectories,
                tests and benchmarks.
            listener: told, by ``step``, what happened to the request.

        Raises:
            InputError: the request can never be served; lists every reason.
        """

    @abstractmethod
    def step(self) -> list[Trajectory]:
        """Go on with the unfinished requests for a moment; return those that ended.

        Raises:
            StaleWeightsError: no weights were loaded.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request; a later ``step`` returns what it has generated, finished as ABORTED.

        Raises:
            InputError: no unfinished request has this id.
        """

    @abstractmethod
    def preempt(self, request_id: str) -> None:
        """Take the memory of a running request; its tokens stay, and it goes on when there is room.

        For operators who want the memory for others, and for tests; a request that waits is left as
        it is.

        Raises:
            InputError: no unfinished request has this id.
        """

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
        finished: dict[str, Trajectory] = {}
        self._add_all(requests, None)
        while self.unfinished:
            for trajectory in self.step():
                finished[f"{trajectory.prompt_id}#{trajectory.rollout}"] = trajectory
                if on_finish is not None:
                    on_finish(trajectory)
        return [finished[request.request_id] for request in requests]

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[Event]:
        """Decode ``requests`` and yield what happens, in order, until all have ended.

        An iterator that is closed early aborts what is unfinished.

        Raises:
            InputError: a request is refused, or earlier ones are unfinished; nothing was decoded.
        """
        events: list[Event] = []
        self._add_all(requests, events.append)
        try:
            while self.unfinished:
                self.step()
                yield from events
                events.clear()
        finally:  # left early: the engine is as free as before
            for request_id in list(self.unfinished):
                self.abort(request_id)
            while self.unfinished:
                self.step()

    @abstractmethod
    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] fp32 log-probs under the live weights.

        Positions and branches are those recorded; 0.0 on the prompt and where nothing predicts a
        token.

        Raises:
            StaleWeightsError: no weights were loaded.
        """

    # State

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return what the engine holds and has done."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless all memory is free or held by one owner, who needs it."""

    @abstractmethod
    def close(self) -> None:
        """Give back processes and memory; safe to call twice."""

    # Weights

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """What is served, by storage name (``weights.layouts.engine_layout``). Read it; to change
        it use ``load``, or ``staging`` and ``commit``.
        """

    @property
    @abstractmethod
    def weight_version(self) -> int:
        """Version of the live weights; -1 until some are loaded."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Replace all weights at once; trajectories go on as after :meth:`commit`.

        Raises:
            LayoutError: a storage is missing, unknown or of another shape; nothing was replaced.
            DivergenceError: a storage holds NaN or infinity; nothing was replaced.
        """

    @abstractmethod
    def staging(self) -> dict[str, Tensor]:
        """Return the shadow storages: same names and shapes as ``weights``, filled by the caller
        while decoding goes on.
        """

    @abstractmethod
    def seal(self) -> None:
        """Check what was staged beforehand, so that ``commit`` takes no longer than a copy.

        Call it when the shadow storages are filled, from the thread that filled them.

        Raises:
            DivergenceError: a storage holds NaN or infinity; fill ``staging()`` anew.
        """

    @abstractmethod
    def commit(self, version: int) -> None:
        """Make the staged weights live and stamp later tokens with ``version``.

        Unfinished trajectories go on as ``EngineConfig.kv_after_push`` says: from their prompts
        (``drop``); from their text, with keys and values of the new weights, so that later tokens
        are those of the new policy given the same text (``recompute``); or from their text with the
        keys and values they have (``keep``; one that is preempted later is computed anew).

        Raises:
            StaleWeightsError: nothing was staged, or ``version`` is not newer than the live one.
            DivergenceError: what was staged holds NaN or infinity. Nothing has changed then.
        """

    def _add_all(
        self, requests: Sequence[GenerationRequest], listener: Callable[[Event], None] | None
    ) -> None:
        """Queue all of ``requests`` or, raising what is wrong with them, none."""
        if self.unfinished:
            raise InputError(
                f"a batch was to be decoded with {self.num_unfinished} requests unfinished; "
                "drain them with step()"
            )
        problems = [x for request in requests for x in self.problems(request)]
        ids = [request.request_id for request in requests]
        problems += [
            f"request {name}: the batch holds {ids.count(name)} requests of this id; use another "
            "rollout"
            for name in sorted(set(ids))
            if ids.count(name) > 1
        ]
        if problems:
            raise InputError("\n".join(problems))
        for request in requests:
            self.add(request, listener=listener)
