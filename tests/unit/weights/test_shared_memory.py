"""Push through arenas: bits, versions, and everything that must not be served."""

from __future__ import annotations

import pickle
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import (
    DivergenceError,
    LayoutError,
    StaleWeightsError,
)
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.executors.arena import Arena, arena_bytes
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout, Storage, Tile, rank_of
from tests.unit.weights.oracles import (
    Topology,
    element_ids,
    engine_storages,
    num_different,
    tiny_model,
    topologies,
    trainer_storages,
)

MODEL = tiny_model()
PARALLEL = ParallelConfig(tp_size=2, pp_size=2, dp_size=2)
SOURCE = trainer_layout(MODEL, PARALLEL)
ENGINE = engine_layout(MODEL)


def expert_tile(number: int) -> Tile:
    """Expert ``number`` of a stack of two."""
    return Tile(f"e{number}", Box((0, 0), (4, 6)), "q", (number, 0, 0))


PINNED = Layout(
    "engine",
    (
        rank_of(
            [
                (Storage("q", (2, 4, 6), "fp8_e4m3"), (expert_tile(0), expert_tile(1))),
                (Storage("bias", (3,), "fp32"), (Tile("b", Box((0,), (3,)), "bias", (0,)),)),
                (Storage("w", (4, 2)), (Tile("w", Box((0, 0), (4, 2)), "w", (0, 0)),)),
            ]
        ),
    ),
)
"""Stacked fp8 experts and an fp32 bias before the first storage of the weights' dtype."""


def weights_of(seed: int, dtype: torch.dtype = torch.float32):
    return {n: t.to(dtype) for n, t in random_init(MODEL, InitConfig(), seed).items()}


@contextmanager
def opened(folder, layout=SOURCE, dtype=torch.float32):
    """Publishers of all ranks of ``layout``, as one function."""
    with ExitStack() as stack:
        publishers = [
            Publisher(layout, rank, dtype, run_id="test", arena_dir=folder)
            for rank in range(len(layout.ranks))
        ]
        for publisher in publishers:
            stack.callback(publisher.close)

        def publish(version: int, storages) -> Publication:
            parts = [p.publish(version, s) for p, s in zip(publishers, storages, strict=True)]
            return Publication.assemble(parts[::-1])

        yield publish


@pytest.fixture
def publish(tmp_path):
    with opened(tmp_path) as function:
        yield lambda version, seed: function(
            version, trainer_storages(MODEL, PARALLEL, weights_of(seed))
        )


def staging(dtype: torch.dtype = torch.float32):
    return empty_storages(ENGINE.ranks[0], dtype)


@settings(max_examples=12, deadline=None)
@given(topologies())
def test_every_element_arrives_through_arenas_on_random_topologies(
    tmp_path_factory, topology: Topology
):
    model, parallel, engine_tp = topology.model, topology.parallel, topology.engine_tp_size
    source, target = trainer_layout(model, parallel), engine_layout(model, engine_tp)
    ids = element_ids(model)
    with opened(tmp_path_factory.mktemp("arenas"), source, torch.int64) as publish:
        publication = publish(0, trainer_storages(model, parallel, ids))
        arrived = [empty_storages(rank, torch.int64) for rank in target.ranks]
        publication.check(
            Receiver(source, target, rank).pull(publication, into)
            for rank, into in enumerate(arrived)
        )
    assert num_different(arrived, engine_storages(model, engine_tp, ids)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_receives_the_trainers_bits(tmp_path, dtype):
    weights = weights_of(1, dtype)
    with opened(tmp_path, dtype=dtype) as publish:
        publication = publish(5, trainer_storages(MODEL, PARALLEL, weights))
        into = staging(dtype)
        Receiver(SOURCE, ENGINE).pull(pickle.loads(pickle.dumps(publication)), into)
    assert num_different([into], engine_storages(MODEL, 1, weights)) == 0


def test_fp32_trainer_is_cast_once_for_a_bf16_engine(tmp_path):
    weights = weights_of(1)
    with opened(tmp_path, dtype=torch.bfloat16) as publish:
        into = staging(torch.bfloat16)
        Receiver(SOURCE, ENGINE).pull(publish(0, trainer_storages(MODEL, PARALLEL, weights)), into)
    assert num_different([into], engine_storages(MODEL, 1, weights_of(1, torch.bfloat16))) == 0


def test_hf_tensors_are_exported_by_pulling_the_canonical_layout(publish):
    target = canonical_layout(MODEL)
    into = empty_storages(target.ranks[0], torch.float32)
    Receiver(SOURCE, target).pull(publish(0, seed=3), into)
    assert num_different([into], [weights_of(3)]) == 0


def test_late_joiner_reads_a_version_while_the_next_one_exists_but_not_two_later(publish):
    first = publish(0, seed=1)
    publish(1, seed=2)
    into = staging()
    Receiver(SOURCE, ENGINE).pull(first, into)
    assert num_different([into], engine_storages(MODEL, 1, weights_of(1))) == 0
    publish(2, seed=3)
    with pytest.raises(StaleWeightsError, match=r"version 0 is asked for.*\[1, 2\]"):
        Receiver(SOURCE, ENGINE).pull(first, into)


def test_one_receiver_follows_many_versions(publish):
    receiver, into = Receiver(SOURCE, ENGINE), staging()
    for version in range(5):
        receiver.pull(publish(version, seed=version), into)
        assert num_different([into], engine_storages(MODEL, 1, weights_of(version))) == 0


def test_receiver_follows_a_trainer_that_restarted_under_the_same_name(tmp_path):
    receiver, into = Receiver(SOURCE, ENGINE), staging()
    for seed in (1, 2):
        with opened(tmp_path) as publish:
            storages = trainer_storages(MODEL, PARALLEL, weights_of(seed))
            receiver.pull(publish(0, storages), into)
        assert num_different([into], engine_storages(MODEL, 1, weights_of(seed))) == 0


class Interrupted(dict):
    """Staging tensors whose owner is interrupted at the first access to ``norm.weight``."""

    def __init__(self, tensors, interrupt):
        super().__init__(tensors)
        self.interrupt = interrupt
        self.accesses = 0

    def __getitem__(self, name):
        if name == "norm.weight":
            self.accesses += 1
            if self.accesses == 2:  # the first is the check of names and shapes
                self.interrupt()
        return super().__getitem__(name)


def test_version_overwritten_in_the_middle_of_a_copy_is_not_accepted(publish):
    publication = publish(0, seed=1)

    def two_more():
        publish(1, seed=2)
        publish(2, seed=3)

    into = Interrupted(staging(), two_more)
    with pytest.raises(StaleWeightsError, match="overwritten while it was read"):
        Receiver(SOURCE, ENGINE).pull(publication, into)
    assert into.accesses >= 2


def test_flipped_byte_in_any_arena_that_is_read_is_noticed(publish):
    publication = publish(0, seed=1)
    receiver = Receiver(SOURCE, ENGINE)
    noticed = 0
    for rank, path in enumerate(publication.arena_paths):
        middle = 4096 + arena_bytes(SOURCE.ranks[rank], torch.float32) // 8
        flip(path, middle)
        try:
            receiver.pull(publication, staging())
        except StaleWeightsError as error:
            assert "digest" in str(error)
            noticed += 1
        flip(path, middle)
    receiver.pull(publication, staging())
    assert noticed >= len(SOURCE.ranks) // 2  # the others serve their replica's part elsewhere


def flip(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_replicas_that_differ_between_trainer_ranks_are_not_published(tmp_path):
    storages = trainer_storages(MODEL, PARALLEL, weights_of(1))
    tied = storages[-1]["output_layer.weight"].clone()
    tied[0, 0] += 1
    storages[-1] = {**storages[-1], "output_layer.weight": tied}
    with opened(tmp_path) as publish, pytest.raises(DivergenceError, match="replicas"):
        publish(0, storages)


def test_publication_of_another_layout_or_dtype_is_refused(publish):
    publication = publish(0, seed=1)
    other = trainer_layout(MODEL, ParallelConfig(tp_size=2))
    with pytest.raises(StaleWeightsError, match="laid out anew"):
        Receiver(other, ENGINE).pull(publication, staging())
    with pytest.raises(LayoutError, match=r"torch\.float32.*torch\.bfloat16"):
        Receiver(SOURCE, ENGINE).pull(publication, staging(torch.bfloat16))


def test_incomplete_or_mixed_parts_make_no_publication(tmp_path):
    storages = trainer_storages(MODEL, PARALLEL, weights_of(1))
    publishers = [
        Publisher(SOURCE, rank, torch.float32, run_id="test", arena_dir=tmp_path)
        for rank in range(len(SOURCE.ranks))
    ]
    parts = [p.publish(0, s) for p, s in zip(publishers, storages, strict=True)]
    newer = publishers[0].publish(1, storages[0])
    for wrong in (parts[1:], [newer, *parts[1:]], [*parts, parts[0]], []):
        with pytest.raises(StaleWeightsError, match="one part of every source rank"):
            Publication.assemble(wrong)
    for publisher in publishers:
        publisher.close()


def test_versions_must_grow(publish):
    publish(3, seed=1)
    with pytest.raises(StaleWeightsError, match="version 3 was to be published after version 3"):
        publish(3, seed=1)


def test_storages_that_are_not_the_layouts_are_refused_before_anything_is_written(tmp_path):
    storages = trainer_storages(MODEL, PARALLEL, weights_of(1))
    with opened(tmp_path) as publish:
        publication = publish(0, storages)
        wrong = [{**s, "stray.weight": torch.zeros(1)} for s in storages]
        with pytest.raises(LayoutError, match=r"stray\.weight is not declared"):
            publish(1, wrong)
        Receiver(SOURCE, ENGINE).pull(publication, staging())


def test_closed_publishers_leave_no_file_and_readers_learn_that_they_are_gone(tmp_path):
    with opened(tmp_path) as publish:
        publication = publish(0, trainer_storages(MODEL, PARALLEL, weights_of(1)))
        assert len(list(tmp_path.iterdir())) == len(SOURCE.ranks)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StaleWeightsError, match="its owner is gone"):
        Receiver(SOURCE, ENGINE).pull(publication, staging())


def test_a_filling_writes_the_arena_and_a_failed_one_leaves_the_newest_version(tmp_path):
    layout = canonical_layout(MODEL)
    wanted = weights_of(4)
    publisher = Publisher(layout, 0, torch.float32, run_id="fill", arena_dir=tmp_path)

    def fill(views):
        for name, view in views.items():
            view.copy_(wanted[name])

    first = Publication.assemble([publisher.publish_with(0, fill)])
    with pytest.raises(ZeroDivisionError):
        publisher.publish_with(1, lambda views: 1 / 0)
    into = staging()
    Receiver(layout, ENGINE).pull(first, into)
    assert num_different([into], engine_storages(MODEL, 1, wanted)) == 0
    publisher.close()


def test_pinned_dtypes_and_stacked_experts_arrive_bit_for_bit(tmp_path):
    held = empty_storages(PINNED.ranks[0], torch.bfloat16)
    for number, tensor in enumerate(held.values()):
        tensor.view(torch.uint8).copy_(torch.randint(0, 256, tensor.view(torch.uint8).shape))
        assert tensor.dtype == (torch.float8_e4m3fn, torch.float32, torch.bfloat16)[number]
    with opened(tmp_path, PINNED, torch.bfloat16) as publish:
        publication = publish(0, [held])
        into = empty_storages(PINNED.ranks[0], torch.bfloat16)
        Receiver(PINNED, PINNED).pull(publication, into)
    for name, tensor in held.items():
        assert torch.equal(into[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_byte_that_changed_at_the_source_is_named(publish):
    publication = publish(0, seed=1)
    storage = "decoder.layers.1.mlp.linear_fc2.weight"
    for rank in (1, 3):  # data-parallel replicas; one of them is read
        path = publication.arena_paths[rank]
        views = Arena(path, SOURCE.ranks[rank], torch.float32).slots.storages(0)
        flip(path, Path(path).read_bytes().index(views[storage].numpy().tobytes()))
    name = r"model\.layers\.1\.mlp\.down_proj\.weight changed on source rank"
    wrong = rf"wrong: {name} 1; {name} 3$"
    with pytest.raises(StaleWeightsError, match=wrong):
        Receiver(SOURCE, ENGINE).pull(publication, staging())


class ChangingOnce(dict):
    """Staging tensors of which one element is overwritten after the first copies into them."""

    def __init__(self, tensors, num_times):
        super().__init__(tensors)
        self.num_times = num_times

    def values(self):
        if self.num_times:
            self.num_times -= 1
            self["norm.weight"][0] += 1
        return super().values()


def test_one_wrong_reading_is_repeated_and_two_are_reported(publish):
    publication = publish(0, seed=1)
    into = ChangingOnce(staging(), 1)
    Receiver(SOURCE, ENGINE).pull(publication, into)
    assert num_different([dict(into.items())], engine_storages(MODEL, 1, weights_of(1))) == 0
    with pytest.raises(StaleWeightsError, match=r"read twice, wrong: norm\.weight arrived wrong$"):
        Receiver(SOURCE, ENGINE).pull(publication, ChangingOnce(staging(), 2))


def test_ranks_of_an_engine_whose_sum_is_wrong_find_the_tensor(publish):
    target = engine_layout(MODEL, 2)
    publication = publish(0, seed=1)
    receivers = [Receiver(SOURCE, target, rank) for rank in range(2)]
    held = [empty_storages(rank, torch.float32) for rank in target.ranks]
    shares = [r.pull(publication, into) for r, into in zip(receivers, held, strict=True)]
    publication.check(shares)
    held[1]["layers.2.o_proj.weight"][0, 0] += 1
    found = [r.faults(publication, into) for r, into in zip(receivers, held, strict=True)]
    assert found == [[], ["layers.2.o_proj.weight arrived wrong"]]


def test_a_peer_catches_up_from_an_engine_when_the_trainer_is_gone(tmp_path):
    """The digest of the version survives trainer -> engine -> engine, also of another tp size."""
    served = staging()
    with opened(tmp_path) as publish:
        original = publish(7, trainer_storages(MODEL, PARALLEL, weights_of(1)))
        Receiver(SOURCE, ENGINE).pull(original, served)
    peer = Publisher(ENGINE, 0, torch.float32, run_id="run.engine0", arena_dir=tmp_path)
    again = Publication.assemble([peer.publish(7, served)])
    assert (again.version, again.digest) == (original.version, original.digest)
    late = staging()
    Receiver(ENGINE, ENGINE).pull(again, late)
    assert num_different([late], [served]) == 0
    sharded = engine_layout(MODEL, 4)
    held = [empty_storages(rank, torch.float32) for rank in sharded.ranks]
    original.check(Receiver(ENGINE, sharded, rank).pull(again, held[rank]) for rank in range(4))
    peer.close()


def test_what_a_rank_holds_twice_arrives_twice(tmp_path):
    whole_tile = Box((0, 0), (4, 2))
    source = Layout(
        "trainer", (rank_of([(Storage("w", (4, 2)), (Tile("w", whole_tile, "w", (0, 0)),))]),)
    )
    twice = [(Storage(n, (4, 2)), (Tile("w", whole_tile, n, (0, 0)),)) for n in ("embed", "head")]
    target = Layout("engine", (rank_of(twice),))
    values = torch.arange(8.0).view(4, 2)
    into = empty_storages(target.ranks[0], torch.float32)
    with opened(tmp_path, source) as publish:
        Receiver(source, target).pull(publish(0, [{"w": values}]), into)
    assert torch.equal(into["embed"], values)
    assert torch.equal(into["head"], values)
