"""The trainer computes a token with the experts that the engine chose for it, in every layout.

Three proofs. With the engine's weights the trainer's log-probs are the engine's. With a router that
chooses differently they are those of transformers whose routers are forced, and far from those of
the trainer left free. And with experts drawn at random, which no router would choose, every layout
gives the gradients of one rank: a route that reaches a wrong token, layer or microbatch shows.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import MoeConfig
from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import rl_sample
from npr_megatron.pipeline.local_engine import open_engine
from npr_megatron.records.sample import TrainingSample
from npr_megatron.records.trajectory import RouteArray, Trajectory
from npr_megatron.train.step import StepBatch
from npr_megatron.weights.checkpoints.hf import write_hf
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import tile_view
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, learn, train, whole_model
from tests.distributed.parity import Run, compare
from tests.distributed.samples import step_batches
from tests.engines import drain, request_for, skeleton_of, steered_weights
from tests.parity.hf_reference import hf_model
from tests.parity.test_trainer_hf import hf_logprobs, unpacked
from tests.structures import SMALL, WORDS, random_structure

TOLERANCE = 1e-5
FAR = 100 * TOLERANCE
NUM_EXPERTS, NUM_CHOSEN, NUM_DENSE = 8, 2, 1
EXPERTS = MODEL.model_copy(
    update={
        "family": "qwen3_moe",
        "tie_word_embeddings": False,
        "moe": MoeConfig(
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_CHOSEN,
            moe_intermediate_size=24,
            num_dense_layers=NUM_DENSE,
        ),
    }
)
NUM_ROUTED = EXPERTS.num_hidden_layers - NUM_DENSE
ONE_RANK = ParallelConfig()

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Weights as the engine holds them, and the HF folder of the same."""

    storages: Tensors
    folder: Path


def policy(folder: Path, storages: Tensors) -> Policy:
    tiles = engine_layout(EXPERTS).ranks[0].tiles
    write_hf(folder, EXPERTS, {tile.parameter: tile_view(tile, storages) for tile in tiles})
    return Policy(storages, folder)


@pytest.fixture(scope="module")
def rollout_policy(tmp_path_factory) -> Policy:
    return policy(tmp_path_factory.mktemp("rollout") / "hf", steered_weights(EXPERTS, 5, WORDS))


@pytest.fixture(scope="module")
def other_policy(tmp_path_factory, rollout_policy: Policy) -> Policy:
    """The same but for its routers, which choose otherwise for a good part of the tokens."""
    generator = torch.Generator().manual_seed(1)
    storages = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        if name.endswith(".gate.weight")
        else tensor
        for name, tensor in rollout_policy.storages.items()
    }
    return policy(tmp_path_factory.mktemp("other") / "hf", storages)


@pytest.fixture(scope="module")
def trajectories(rollout_policy: Policy) -> list[Trajectory]:
    """Trees whose words are sampled, on a pool too small for all at once."""
    config = EngineConfig(num_kv_slots=512, debug_checks=True, record_routes=True)
    engine = open_engine(rollout_policy.folder, config, SMALL)
    rng = random.Random(3)
    for rollout in range(12):
        prompt = rng.choices(WORDS, k=rng.randint(2, 6))
        structure = random_structure(rng, prompt, SMALL, num_blocks=(1, 3), max_tokens=5)
        skeleton = skeleton_of(structure.token_ids, structure.prompt_length, SMALL)
        engine.add(request_for(prompt, rollout=rollout, seed=rollout), skeleton)
    sampled = sorted(drain(engine), key=lambda trajectory: trajectory.rollout)
    assert sum(t.num_blocks > 1 for t in sampled) > 3
    return sampled


def samples_of(trajectories: Sequence[Trajectory], *, replayed: bool) -> list[TrainingSample]:
    samples = [rl_sample(t, 1.0, forced_tokens_in_loss=True) for t in trajectories]
    if replayed:
        return samples
    return [dataclasses.replace(sample, routed_experts=None) for sample in samples]


def trainer_logprobs(
    samples: Sequence[TrainingSample], folder: Path, parallel: ParallelConfig, tmp_path: Path
) -> list[np.ndarray]:
    """Return [T] log-probs of every sample, from packed rows."""
    batch = StepBatch(microbatches=pack(samples, 512, 1, 1), loss=LossConfig(kind="papo"))
    job = Job(hf_folder=folder, model=EXPERTS, parallel=parallel, score=(batch,))
    outcomes = run_ranks(train, parallel.world_size, tmp_path, job)
    scored = outcomes[0].logprobs[0]
    return [unpacked(batch.microbatches, scored, sample) for sample in samples]


def largest(gaps: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(gap).max()) for gap in gaps)


@pytest.mark.parametrize(
    "parallel",
    [ONE_RANK, ParallelConfig(tp_size=2, ep_size=2, etp_size=1)],
    ids=["one rank", "tp2 ep2"],
)
def test_with_the_engines_weights_the_trainer_is_the_engine(
    parallel, rollout_policy, trajectories, tmp_path
) -> None:
    samples = samples_of(trajectories, replayed=True)
    scored = trainer_logprobs(samples, rollout_policy.folder, parallel, tmp_path)
    gaps = [
        (found - trajectory.logprobs)[sample.loss_mask]
        for found, trajectory, sample in zip(scored, trajectories, samples, strict=True)
    ]
    assert sum(map(len, gaps)) > 400
    assert largest(gaps) <= TOLERANCE


@contextmanager
def forced(reference: PreTrainedModel, routes: RouteArray | None) -> Iterator[None]:
    """Let the routers of transformers choose [T, M, K]; what is -1 they choose for themselves."""

    def hook_of(layer: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def choose(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> Any:
            logits, _, own = output
            wanted = torch.from_numpy(np.array(routes))[:, layer].long()
            chosen = torch.where(wanted >= 0, wanted, own)
            shares = logits.softmax(-1).gather(1, chosen)
            return logits, shares / shares.sum(-1, keepdim=True), chosen

        return choose

    layers: Any = reference.model.layers
    routers = [layer.mlp.gate for layer in layers[NUM_DENSE:]] if routes is not None else []
    handles = [
        router.register_forward_hook(hook_of(number)) for number, router in enumerate(routers)
    ]
    yield
    for handle in handles:
        handle.remove()


def test_other_routers_are_overruled_exactly(other_policy, trajectories, tmp_path) -> None:
    reference: Any = hf_model(EXPERTS, other_policy.storages)
    for replayed in (True, False):
        samples = samples_of(trajectories, replayed=replayed)
        scored = trainer_logprobs(samples, other_policy.folder, ONE_RANK, tmp_path)
        as_forced, as_free = [], []
        for sample, trajectory, found in zip(samples, trajectories, scored, strict=True):
            for gaps, routes in ((as_forced, trajectory.routed_experts), (as_free, None)):
                with forced(reference, routes):
                    gaps.append(found - hf_logprobs(reference, sample))
        alike, different = (as_forced, as_free) if replayed else (as_free, as_forced)
        assert largest(alike) <= TOLERANCE
        assert min(largest([gap]) for gap in different) > FAR


def with_random_routes(steps: tuple[StepBatch, ...]) -> tuple[StepBatch, ...]:
    """Experts drawn for every token; padding, and one token in eight, is left to the router."""
    rng = np.random.default_rng(2)
    routed = []
    for step in steps:
        microbatches = []
        for batch in step.microbatches:
            draws = rng.random((*batch.shape, NUM_ROUTED, NUM_EXPERTS))
            routes = draws.argsort(-1)[..., :NUM_CHOSEN].astype(np.int16)
            is_free = (batch.segment < 0) | (rng.random(batch.shape) < 1 / 8)
            routes[is_free] = -1
            microbatches.append(dataclasses.replace(batch, routed_experts=routes))
        routed.append(dataclasses.replace(step, microbatches=tuple(microbatches)))
    return tuple(routed)


def recomputed_layers() -> None:
    """Keep the input of every layer only; backward passes compute the rest again."""
    _change_config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def recomputed_experts() -> None:
    """Keep all but what routers and experts computed."""
    _change_config(recompute_granularity="selective", recompute_modules=["moe"])


def _change_config(**changes: Any) -> None:
    from npr_megatron.model import build

    original = build.transformer_config

    def config(*arguments: Any) -> Any:
        built = original(*arguments)
        for name, value in changes.items():
            setattr(built, name, value)
        return built

    build.transformer_config = config


def recomputed_with_the_routes_of_the_last_microbatch() -> None:
    from npr_megatron.model.route_replay import RouterRoutes

    recomputed_layers()
    RouterRoutes._routes_of_this_pass = lambda self: self._routes


def routes_of_the_first_rank_everywhere() -> None:
    from npr_megatron.model.route_replay import RouteReplay

    original = RouteReplay.__init__

    def init(self: Any, chunk: Any, num_dense_layers: int, share: tuple[int, int]) -> None:
        original(self, chunk, num_dense_layers, (0, share[1]))

    RouteReplay.__init__ = init


def layers_counted_from_the_stage() -> None:
    from npr_megatron.model.route_replay import RouteReplay

    original = RouteReplay.__init__

    def init(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        first = min(layer for layer, _ in self._routers)
        self._routers = [(layer - first, routes) for layer, routes in self._routers]

    RouteReplay.__init__ = init


PP2 = ParallelConfig(pp_size=2)
LAYOUTS: dict[str, tuple[ParallelConfig, Callable[[], None] | None]] = {
    "tp2": (ParallelConfig(tp_size=2), None),
    "pp2 vpp2": (ParallelConfig(pp_size=2, vpp_size=2), None),
    "cp2": (ParallelConfig(cp_size=2), None),
    "dp2 ep2": (ParallelConfig(dp_size=2, ep_size=2), None),
    "pp2, layers recomputed": (PP2, recomputed_layers),
    "pp2, experts recomputed": (PP2, recomputed_experts),
}
FAULTS: dict[Callable[[], None], ParallelConfig] = {
    recomputed_with_the_routes_of_the_last_microbatch: PP2,
    routes_of_the_first_rank_everywhere: ParallelConfig(tp_size=2),
    layers_counted_from_the_stage: PP2,
}
BATCHES = with_random_routes(step_batches("papo", 2))


def run(
    parallel: ParallelConfig, folder: Path, tmp_path: Path, change: Callable[[], None] | None = None
) -> Run:
    """Two steps over rows with random routes."""
    job = Job(hf_folder=folder, model=EXPERTS, parallel=parallel, batches=BATCHES)
    ranks = run_ranks(learn, parallel.world_size, tmp_path, job, change)
    return Run(
        ranks[0].results,
        whole_model([rank.gradients for rank in ranks], EXPERTS, parallel),
        whole_model([rank.storages for rank in ranks], EXPERTS, parallel),
    )


@pytest.fixture(scope="module")
def one_rank(rollout_policy, tmp_path_factory) -> Run:
    return run(ONE_RANK, rollout_policy.folder, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_with_the_routes_of_its_tokens(
    name, one_rank, rollout_policy, tmp_path
) -> None:
    parallel, change = LAYOUTS[name]
    compare(run(parallel, rollout_policy.folder, tmp_path, change), one_rank)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_route_at_the_wrong_place_shows(fault, one_rank, rollout_policy, tmp_path) -> None:
    with pytest.raises(AssertionError, match="gradient of"):
        compare(run(FAULTS[fault], rollout_policy.folder, tmp_path, fault), one_rank)
