"""The engines that the contract binds, and the engine that says what they must write.

Every choice of ``kv_after_push``, every way of SGLang to run (tensor parallel or not, overlapped or
not) and both vocabularies occur; not each with each, since starting an engine takes its time.
SGLang under ``recompute`` is in ``test_pressure``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.engine.backends import create_engine, storages_of
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.absence import absence_of_sglang
from tests.engines import UNTIED, drain, random_weights, tiny_engine
from tests.parity.hf_reference import hf_model
from tests.policy import learnt_weights
from tests.structures import SMALL, SPLIT

MODEL = UNTIED.model_copy(update={"max_position_embeddings": 2048})
ROUNDING = 1e-4
"""Of log-probs of a sharp policy, between two implementations."""
Asked = tuple[GenerationRequest, Teacher | None]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to be an engine."""

    name: str
    config: EngineConfig
    vocabulary: Vocabulary

    @property
    def absence(self) -> str:
        """Why it cannot run here; empty where it can."""
        return absence_of_sglang() if self.config.backend == "sglang" else ""

    def stored(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``weights``, given as storages of the embedded engine, as this backend's."""
        if self.config.backend == "embedded":
            return weights
        (layout,) = storages_of(MODEL, self.config).ranks
        storages = empty_storages(layout, torch.float32)
        load_tiles(layout, box_reader(hf_model(MODEL, weights).state_dict()), storages)
        return storages

    def load(self, engine: Engine, weights: dict[str, Tensor], version: int = 0) -> None:
        """Replace the weights of an engine of this backend at once."""
        engine.load(self.stored(weights), version)

    def stage(self, engine: Engine, weights: dict[str, Tensor]) -> None:
        """Fill the shadow of an engine of this backend."""
        staged, given = engine.staging(), self.stored(weights)
        assert staged.keys() == given.keys()
        for name, tensor in given.items():
            staged[name].copy_(tensor)

    def oracle(self, weights: dict[str, Tensor], version: int = 0) -> Engine:
        """Return an embedded engine for a few requests at a time."""
        engine = tiny_engine(model=MODEL, vocabulary=self.vocabulary, max_running=5)
        engine.load(weights, version)
        return engine

    def expected(
        self, asked: Sequence[Asked], weights: dict[str, Tensor], version: int = 0
    ) -> list[Trajectory]:
        """Return what ``asked`` must come to, by rollout."""
        return decode(self.oracle(weights, version), asked)


def _config(**changes: object) -> EngineConfig:
    settings = {"num_kv_slots": 40_000, "max_running": 64, "max_streams": 320}
    return EngineConfig.model_validate({**settings, "debug_checks": True, **changes})


def _sglang(*, overlap: bool, **changes: object) -> EngineConfig:
    return _config(backend="sglang", sglang=SglangConfig(overlap=overlap), **changes)


BACKENDS = [
    Backend(name="embedded, drop", config=_config(kv_after_push="drop"), vocabulary=SMALL),
    Backend(
        name="embedded, recompute", config=_config(kv_after_push="recompute"), vocabulary=SPLIT
    ),
    Backend(name="embedded, keep", config=_config(kv_after_push="keep"), vocabulary=SMALL),
    Backend(
        name="sglang, overlap, drop",
        config=_sglang(overlap=True, kv_after_push="drop"),
        vocabulary=SMALL,
    ),
    Backend(
        name="sglang, tp 2, no overlap, keep",
        config=_sglang(overlap=False, tp_size=2, kv_after_push="keep"),
        vocabulary=SPLIT,
    ),
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A running engine of one backend."""

    backend: Backend
    engine: Engine
    complaints: dict[str, str]
    """What it said while it had no weights, by what it was asked to do."""

    @classmethod
    def start(cls, backend: Backend) -> Subject:
        """Start the engine, hear what it cannot do without weights, and give it some."""
        engine = create_engine(MODEL, backend.config, backend.vocabulary, "cpu")
        assert engine.weight_version == -1
        complaints = {
            "step": _complaint(engine.step),
            "score": _complaint(lambda: engine.score([])),
            "commit": _complaint(lambda: engine.commit(1)),
        }
        backend.load(engine, random_weights(MODEL, 0))
        return cls(backend=backend, engine=engine, complaints=complaints)


def _complaint(act: Callable[[], object]) -> str:
    try:
        act()
    except StaleWeightsError as error:
        return str(error)
    return ""


def decode(engine: Engine, asked: Sequence[Asked]) -> list[Trajectory]:
    """Decode all of ``asked`` together; return the trajectories by rollout."""
    for request, teacher in asked:
        engine.add(request, teacher)
    return sorted(drain(engine), key=lambda trajectory: trajectory.rollout)


@functools.cache
def policy_weights(vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The weights of a policy that has learnt to fork and to join."""
    return learnt_weights(MODEL, vocabulary)
