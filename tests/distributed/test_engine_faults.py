"""An engine of several processes of which one dies, stops or breaks off: nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time

import pytest

from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.compute.tensor_parallel import Follower, LeaderRunner
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.errors import EnvironmentFault
from tests.distributed.engine_ranks import CPU, add_requests, config_of, fill, ranks_of
from tests.distributed.harness import forks, run_ranks
from tests.engines import TINY, drain
from tests.structures import SMALL


def lead_until_the_other_is_gone(init_method, fate, result):
    """Rank 0: decode, send ``fate`` to rank 1 in the middle, write down how that ends."""
    config = config_of()
    with ranks_of(0, 2, init_method, timeout_s=2.0) as ranks:
        engine = EmbeddedEngine(
            TINY, config, SMALL, runner=LeaderRunner(LocalRunner(TINY, config, CPU, ranks), ranks)
        )
        fill(engine.staging(), TINY, config, 1, 0, 2)
        other = ranks.vote(os.getpid())[1]
        engine.commit(1)
        add_requests(engine)
        for _ in range(5):
            engine.step()
        os.kill(other, fate)
        with pytest.raises(EnvironmentFault) as fault:
            drain(engine)
        result.write_text(str(fault.value))


def follow_until_the_end(init_method):
    """Rank 1."""
    config = config_of()
    with ranks_of(1, 2, init_method, timeout_s=2.0) as ranks:
        follower = Follower(LocalRunner(TINY, config, CPU, ranks), ranks)
        fill(follower.staging(), TINY, config, 1, 1, 2)
        follower.seal(1)
        ranks.vote(os.getpid())
        follower.follow()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_leader_whose_follower_dies_or_stops_says_so(fate, tmp_path):
    rendezvous, result = f"file://{tmp_path}/rendezvous", tmp_path / "result"
    follower = forks().Process(target=follow_until_the_end, args=(rendezvous,))
    leader = forks().Process(target=lead_until_the_other_is_gone, args=(rendezvous, fate, result))
    follower.start()
    leader.start()
    leader.join(60)
    for process in (leader, follower):
        process.kill()
        process.join()
    assert leader.exitcode == 0
    message = result.read_text()
    assert "found another gone or silent" in message and "open the engine anew" in message


class BreaksOff(LocalRunner):
    """Fails before its first pass."""

    def run(self, batch):
        raise MemoryError


def break_off_or_follow(rank, size, init_method):
    """The leader fails on its own. The ranks' timeout is beyond that of the test."""
    config = config_of()
    with ranks_of(rank, size, init_method, timeout_s=600.0) as ranks:
        local = (LocalRunner if rank else BreaksOff)(TINY, config, CPU, ranks)
        if rank:
            follower = Follower(local, ranks)
            fill(follower.staging(), TINY, config, 1, rank, size)
            follower.seal(1)
            with pytest.raises(EnvironmentFault):
                follower.follow()
        else:
            leader = LeaderRunner(local, ranks)
            engine = EmbeddedEngine(TINY, config, SMALL, runner=leader)
            fill(engine.staging(), TINY, config, 1, rank, size)
            engine.commit(1)
            add_requests(engine)
            with pytest.raises(MemoryError):
                engine.step()
            leader.close()


def test_a_leader_that_breaks_off_lets_the_others_go(tmp_path):
    run_ranks(break_off_or_follow, 2, tmp_path)


def command_or_do_other_things(rank, size, init_method, done):
    with ranks_of(rank, size, init_method, timeout_s=0.5) as ranks:
        if rank:
            for _ in range(300):
                if done.exists():
                    return None
                time.sleep(0.1)
            raise AssertionError("the leader still waits")
        with pytest.raises(EnvironmentFault) as fault:
            ranks.command(b"an order")
        done.touch()
        return str(fault.value)


def test_an_order_that_nobody_comes_to_take_is_not_waited_for(tmp_path):
    message = run_ranks(command_or_do_other_things, 2, tmp_path, tmp_path / "done")[0]
    assert "a command was to be passed on" in message and "silent for 0.5 s" in message


def test_a_follower_whose_leader_dies_ends(tmp_path):
    """It waits for orders without a deadline, so it must notice."""
    assert run_ranks(leave_or_follow, 2, tmp_path) == [None, True]


def leave_or_follow(rank, size, init_method):
    config = config_of()
    with ranks_of(rank, size, init_method) as ranks:
        if rank == 0:
            return None
        with pytest.raises(EnvironmentFault):
            Follower(LocalRunner(TINY, config, CPU, ranks), ranks).follow()
        return True
