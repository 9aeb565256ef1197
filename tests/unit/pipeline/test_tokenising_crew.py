"""Samples are the same whoever lays them out, and a lost process is told."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from npr_megatron.data.conversations import Exchange
from npr_megatron.data.rows import Fault
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenising import ExchangeReader, read_here
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.errors import EnvironmentFault
from npr_megatron.pipeline.tokenising_crew import read_together


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_sums_tokenizer(folder)
    return ExchangeReader(load_tokenizer(folder), max_tokens=64, max_positions=64)


def exchanges(count):
    """Good ones, bad ones, and faults of the rows themselves."""
    for number in range(count):
        if number % 50 == 7:
            yield Fault(f"f:{number}", "corrupt", "not JSON")
        else:
            response = "3" if number % 50 else "<step>"
            yield Exchange(f"f:{number}", response, prompt=f"a:{number % 9}+2?")


@pytest.mark.parametrize("count", [0, 5, 128, 129, 1500])
def test_every_sample_comes_once_and_in_order(count, reader):
    together = list(read_together(reader, exchanges(count), num_processes=3))
    alone = list(read_here(reader, exchanges(count)))
    assert len(together) == len(alone) == count
    for one, other in zip(together, alone, strict=True):
        if isinstance(other, Fault):
            assert one == other
            continue
        assert (one.place, one.prompt_length) == (other.place, other.prompt_length)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.layout.predecessor, other.layout.predecessor)


def test_a_process_that_is_killed_ends_the_reading_with_a_cause(reader):
    class Deadly(ExchangeReader):
        def read(self, exchange):
            if exchange.place == "f:400" and os.getpid() != own:
                os.kill(os.getpid(), signal.SIGKILL)
            return reader.read(exchange)

    own = os.getpid()
    deadly = Deadly(reader._tokenizer, max_tokens=64, max_positions=64)
    with pytest.raises(EnvironmentFault, match="one of 2 processes that tokenise was killed"):
        list(read_together(deadly, exchanges(1000), num_processes=2))
