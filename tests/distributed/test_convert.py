"""Real Megatron ranks load what was converted, and what they save is read: bit by bit, strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.checkpoints.chunking import ReaderShape, chunk_groups
from npr_megatron.weights.checkpoints.comparison import State, compare, open_side
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.storages import empty_storages, load_tiles
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import Job, train
from tests.distributed.live_models import build_chunks
from tests.distributed.samples import step_batches
from tests.unit.weights.folders import MODELS, QWEN3, UNTIED, convert, write_hf_folder

TIED = QWEN3.model_copy(update={"vocab_size": 64})
EVEN = {name: model.model_copy(update={"vocab_size": 64}) for name, model in MODELS.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how its ranks are laid out, and where its checkpoints are."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig
    folder: Path = Path()

    @property
    def reader_shape(self) -> tuple[int, int, int]:
        return self.parallel.tp_size, self.parallel.pp_size, self.parallel.ep_size


def case(name: str, model: ModelConfig, **parallel) -> Case:
    return Case(name=name, model=model, parallel=ParallelConfig(**parallel))


CASES = [
    case("tp2", TIED, tp_size=2),
    case("tp2 padded", UNTIED, tp_size=2, vocab_divisor=16),
    case("pp2", TIED, pp_size=2),
    case("pp2 vpp2", EVEN["llama"], pp_size=2, vpp_size=2),
    case("ep2", EVEN["qwen3_moe"], dp_size=2, ep_size=2),
    case("moe pp2", EVEN["glm4_moe"], pp_size=2),
    case("tp2 pp2", EVEN["llama"], tp_size=2, pp_size=2),
    case("moe tp2 ep2", EVEN["glm4_moe"], tp_size=2, dp_size=2, ep_size=2),
]
WORLD_SIZES = sorted({case.parallel.world_size for case in CASES})


def load_and_save(rank, world_size, init_method, cases):
    """Return by case which storages Megatron loaded wrong; what it loaded, it saves again."""
    from npr_megatron.runtime.device import device_scope

    found: dict[str, list[str]] = {}
    for each in cases:
        with device_scope():
            found[each.name] = _load_and_save(rank, world_size, init_method, each)
    return found


def _load_and_save(rank, world_size, init_method, each):
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from npr_megatron.model.storages import stage_storages
    from npr_megatron.runtime import process_group
    from npr_megatron.weights.checkpoints.hf import read_hf

    info = process_group.RankInfo(
        rank=rank,
        world_size=world_size,
        init_method=f"{init_method}-{each.name.replace(' ', '-')}",
    )
    process_group.start(info, each.parallel)
    chunks = build_chunks(each.model, each.parallel)
    if each.model.moe and not each.model.moe.num_dense_layers:
        for chunk in chunks:  # as Megatron's own training says that all layers are alike
            chunk.decoder.config.moe_layer_freq = 1
    wanted = {str(n): chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
    # The norm before experts is there twice, once under the name that this build does not use.
    strict = "raise_unexpected" if each.model.moe else "raise_all"
    state = dist_checkpointing.load(wanted, str(each.folder / "megatron"), strict=strict)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[str(number)])
    held = stage_storages(chunks)
    layout = trainer_layout(each.model, each.parallel).ranks[rank]
    expected = empty_storages(layout, torch.float32)
    load_tiles(layout, read_hf(each.folder / "hf", each.model).read, expected)
    assert held.keys() == expected.keys()
    if rank == 0:
        (each.folder / "saved").mkdir()
    dist.barrier()
    state = {str(n): chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
    dist_checkpointing.save(state, str(each.folder / "saved"))
    process_group.stop()
    return [name for name in held if not torch.equal(held[name], expected[name])]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Every case converted, loaded and saved; by world size what each rank found."""
    base = tmp_path_factory.mktemp("convert")
    found: dict[str, tuple[Case, list[list[str]]]] = {}
    for size in WORLD_SIZES:
        cases: list[Case] = []
        for each in CASES:
            if each.parallel.world_size == size:
                folder = base / each.name
                write_hf_folder(folder / "hf", each.model)
                convert(folder / "hf", folder / "megatron", reader_shape=each.reader_shape)
                cases.append(Case(**{**vars(each), "folder": folder}))
        per_rank = run_ranks(load_and_save, size, base, cases)
        found |= {each.name: (each, [rank[each.name] for rank in per_rank]) for each in cases}
    return found


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_megatron_loads_what_we_wrote(name, exchanged):
    _, wrong = exchanged[name]
    assert wrong == [[]] * len(wrong)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_we_read_what_megatron_saved(name, exchanged):
    each, _ = exchanged[name]
    saved = open_side(each.folder / "saved", each.folder / "hf")
    found = compare(saved, open_side(each.folder / "hf", None), lambda progress: None)
    assert {comparison.state for comparison in found} == {State.EQUAL}


@pytest.mark.parametrize("name", [c.name for c in CASES if "padded" not in c.name])
def test_our_chunks_are_those_that_megatron_writes(name, exchanged):
    each, _ = exchanged[name]
    saved = open_side(each.folder / "saved", each.folder / "hf")
    groups = chunk_groups(each.model, saved.layout.ranks[0], ReaderShape(*each.reader_shape), 10**9)
    ours = {(chunk.storage, chunk.box) for group in groups for chunk in group}
    theirs = {(t.name, chunk.box) for t in saved.tensors.values() for chunk in t.chunks}
    assert ours == theirs


def test_a_checkpoint_of_our_trainer_is_what_it_exports(hf_folder, tmp_path):
    job = Job(
        hf_folder=hf_folder,
        parallel=ParallelConfig(tp_size=2),
        batches=step_batches("sft", 1),
        save_to=tmp_path / "checkpoints",
        export_to=tmp_path / "exported",
    )
    run_ranks(train, 2, tmp_path, job)
    saved = open_side(tmp_path / "checkpoints", hf_folder)
    found = compare(saved, open_side(tmp_path / "exported", None), lambda progress: None)
    assert {comparison.state for comparison in found} == {State.EQUAL}
    found = compare(saved, open_side(hf_folder, None), lambda progress: None)
    assert {comparison.state for comparison in found} == {State.DIFFERENT}, "nothing was trained"


def test_a_converted_back_checkpoint_of_megatron_is_the_original(exchanged, tmp_path):
    each, _ = exchanged["tp2 pp2"]
    back = convert(each.folder / "saved", tmp_path / "back", hf_folder=each.folder / "hf")
    found = compare(
        open_side(back, None), open_side(each.folder / "hf", None), lambda progress: None
    )
    assert {comparison.state for comparison in found} == {State.EQUAL}
    assert (back / "config.json").read_bytes() == (each.folder / "hf/config.json").read_bytes()
