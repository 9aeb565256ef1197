"""Every planted fault in a plan or its messages is refused; what carries out right is not.

Faults are planted at random places of plans for random topologies. Some are faults by definition: a
copy less, an element written twice, a byte too many on the wire. Of the others, executing the plan
on element ids decides, with garbage in the source's padding: the verifier must agree either way.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.plans.messages import message_rounds
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.proof.verify_messages import verify_messages
from npr_megatron.weights.storages import empty_storages
from tests.unit.weights.faults import ALWAYS_WRONG, JUDGED, Case, spoiled_rounds
from tests.unit.weights.oracles import (
    Topology,
    by_rank,
    element_ids,
    num_different,
    source_storages,
    target_storages,
    topologies,
)

GARBAGE = -7


def arrives(topology: Topology, plan: TransferPlan) -> bool:
    """Whether execution brings every element where it belongs, and only there."""
    ids = element_ids(topology.model)
    held = source_storages(topology, ids)
    for storages in held:
        for tensor in storages.values():
            tensor[tensor == 0] = GARBAGE  # ids begin with 1: this is padding
    arrived = [empty_storages(rank, torch.int64) for rank in topology.target.ranks]
    try:
        execute(plan, by_rank(held), by_rank(arrived))
    except (KeyError, IndexError, RuntimeError):
        return False
    return num_different(arrived, target_storages(topology, ids)) == 0


def nodes_for(topology: Topology, random: Random) -> list[int]:
    per_node = random.choice([1, 2, topology.engine_tp_size])
    return [rank // per_node for rank in range(topology.engine_tp_size)]


def planned(topology: Topology, seed: int) -> Case:
    random = Random(seed)
    nodes = nodes_for(topology, random)
    plan = plan_transfer(topology.source, topology.target, target_nodes=nodes)
    return Case(topology, plan, random)


random_cases = settings(
    max_examples=90,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_every_planted_fault_is_refused():
    num_planted: Counter[str] = Counter()

    @random_cases
    @given(topologies(), st.integers(0, 2**32))
    def plant(topology: Topology, seed: int) -> None:
        case = planned(topology, seed)
        assert verify_transfer(case.plan, topology.source, topology.target) == []
        for fault in ALWAYS_WRONG:
            if (spoiled := fault(case)) is not None:
                num_planted[fault.__name__] += 1
                problems = verify_transfer(spoiled, topology.source, topology.target)
                assert problems != [], fault.__name__

    plant()
    assert set(num_planted) == {fault.__name__ for fault in ALWAYS_WRONG}
    assert min(num_planted.values()) >= 5, num_planted


def test_the_verifier_agrees_with_execution():
    verdicts: Counter[tuple[str, bool]] = Counter()

    @random_cases
    @given(topologies(), st.integers(0, 2**32))
    def judge(topology: Topology, seed: int) -> None:
        case = planned(topology, seed)
        assert arrives(topology, case.plan)
        for fault in JUDGED:
            if (changed := fault(case)) is not None:
                is_right = verify_transfer(changed, topology.source, topology.target) == []
                assert is_right == arrives(topology, changed), fault.__name__
                verdicts[(fault.__name__, is_right)] += 1

    judge()
    for fault in JUDGED:
        assert verdicts[(fault.__name__, False)] >= 10, verdicts
        assert verdicts[(fault.__name__, True)] >= 1, verdicts


def test_every_fault_in_messages_is_refused():
    num_planted: Counter[str] = Counter()

    @random_cases
    @given(topologies(), st.integers(0, 2**32))
    def plant(topology: Topology, seed: int) -> None:
        case = planned(topology, seed)
        terms = {
            "source_processes": [n % 2 for n in range(len(topology.source.ranks))],
            "target_processes": [2 + n % 2 for n in range(len(topology.target.ranks))],
            "message_bytes": case.random.choice([40, 200]),
            "weight_bytes": 1,
        }
        rounds = message_rounds(case.plan.copies, **terms)
        assert verify_messages(rounds, case.plan.copies, **terms) == []
        for fault, spoiled in spoiled_rounds(rounds, case.random).items():
            if spoiled != rounds:
                num_planted[fault] += 1
                assert verify_messages(spoiled, case.plan.copies, **terms) != [], fault

    plant()
    assert min(num_planted.values()) >= 30, num_planted
