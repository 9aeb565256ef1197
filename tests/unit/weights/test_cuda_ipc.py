"""Device arenas: all that needs no device, on host memory; with a GPU, two processes share it."""

from __future__ import annotations

import inspect
import json
import multiprocessing
from itertools import pairwise

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from npr_megatron.errors import EnvironmentFault, StaleWeightsError
from npr_megatron.weights.executors.cuda_ipc import (
    _DEVICE_ARGUMENT,
    DeviceHandle,
    DevicePublisher,
    DeviceReceiver,
    check_size,
)
from npr_megatron.weights.executors.slots import Slots, slot_bytes
from npr_megatron.weights.executors.versions import VersionReader, VersionWriter
from npr_megatron.weights.layouts import canonical_layout, engine_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import empty_storages
from tests.unit.weights.oracles import element_ids, engine_storages, num_different, tiny_model

MODEL = tiny_model()
SOURCE, TARGET = canonical_layout(MODEL), engine_layout(MODEL)
HANDLE = DeviceHandle("GPU-b", 4096, "payload")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_versions_in_one_slot_of_plain_memory_arrive_and_the_older_one_is_gone():
    memory = torch.zeros(slot_bytes(SOURCE.ranks[0], torch.int64), dtype=torch.uint8)
    slots = Slots(memory, SOURCE.ranks[0], torch.int64)
    views = slots.storages(0).values()
    ends = [(v.data_ptr(), v.data_ptr() + v.nbytes) for v in views]
    assert all(start % 64 == memory.data_ptr() % 64 for start, _ in ends)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= memory.data_ptr() + memory.numel()
    writer, reader = VersionWriter(SOURCE, 0, torch.int64), VersionReader(SOURCE, TARGET, 0)
    publications = []
    for version in range(2):
        held = {name: ids + version for name, ids in element_ids(MODEL).items()}
        part = writer.write(version, writer.copy_of(held), slots, HANDLE.address)
        publications.append(Publication.assemble([part]))
        into = empty_storages(TARGET.ranks[0], torch.int64)
        reader.read(publications[-1], {0: slots}, into)
        assert num_different([into], engine_storages(MODEL, 1, held)) == 0
    with pytest.raises(StaleWeightsError, match=r"version 0 is asked for.*\[1\]"):
        reader.read(publications[0], {0: slots}, into)


def test_a_handle_survives_the_publication_and_finds_its_gpu_by_uuid():
    assert DeviceHandle.at(HANDLE.address) == HANDLE
    assert HANDLE.on(["GPU-a", "GPU-b"]) == 1
    with pytest.raises(EnvironmentFault, match=r"GPU-b, this process sees \['GPU-a'\]"):
        HANDLE.on(["GPU-a"])
    for address in ("/dev/shm/npr-run-rank00000.arena", json.dumps({"num_bytes": 1}), "[]"):
        with pytest.raises(StaleWeightsError, match="not the handle of device memory"):
            DeviceHandle.at(address)


def test_an_arena_of_another_size_is_refused():
    check_size(HANDLE, 2048)
    for size in (3000, 8192):
        with pytest.raises(StaleWeightsError, match=f"a version takes {size}"):
            check_size(HANDLE, size)


def test_torch_takes_the_device_where_we_put_it():
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert names[_DEVICE_ARGUMENT] == "storage_device"


@without_cuda
def test_without_cuda_both_sides_say_so_and_what_to_use_instead():
    with pytest.raises(EnvironmentFault, match=r"no CUDA device; push through shared memory"):
        DevicePublisher(SOURCE, 0, torch.float32, device=torch.device("cuda:0"))
    with pytest.raises(EnvironmentFault, match="no CUDA device"):
        DeviceReceiver(SOURCE, TARGET)


def _pull(publication: Publication, answers) -> None:
    into = empty_storages(TARGET.ranks[0], torch.int64, "cuda:0")
    receiver = DeviceReceiver(SOURCE, TARGET)
    receiver.pull(publication, into)
    receiver.close()
    answers.put({name: tensor.cpu().numpy() for name, tensor in into.items()})


@with_cuda
@pytest.mark.gpu
def test_another_process_reads_device_memory():
    publisher = DevicePublisher(SOURCE, 0, torch.int64, device=torch.device("cuda:0"))
    ids = {name: tensor.cuda() for name, tensor in element_ids(MODEL).items()}
    publication = Publication.assemble([publisher.publish(0, ids)])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_pull, args=(publication, answers))
    process.start()
    found = {name: torch.from_numpy(array) for name, array in answers.get(timeout=120).items()}
    process.join(timeout=60)
    assert process.exitcode == 0
    assert num_different([found], engine_storages(MODEL, 1, element_ids(MODEL))) == 0
