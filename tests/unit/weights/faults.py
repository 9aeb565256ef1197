"""Faults to plant in a right plan, each at a random place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.messages import Message, Round
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.tiles import Layout
from tests.unit.weights.oracles import Topology


@dataclass(frozen=True)
class Case:
    """A right plan and the chance to spoil it."""

    topology: Topology
    plan: TransferPlan
    random: Random

    def any_copy(self, pattern: str = "") -> int | None:
        """Index of a random copy from a storage whose name has ``pattern``."""
        fitting = [
            n for n, c in enumerate(self.plan.copies) if re.search(pattern, c.source_storage)
        ]
        return self.random.choice(fitting) if fitting else None

    def with_copies(self, copies: Sequence[Copy]) -> TransferPlan:
        return self.with_moves(copies, self.plan.shares)

    def with_moves(self, copies: Sequence[Copy], shares: Sequence[Copy]) -> TransferPlan:
        plan = self.plan
        return TransferPlan.of(
            plan.source_id, plan.target_id, copies, shares, target_nodes=plan.target_nodes
        )

    def with_copy(self, index: int, **changes) -> TransferPlan:
        copies = list(self.plan.copies)
        copies[index] = replace(copies[index], **changes)
        return self.with_copies(copies)


def moved_along(start: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
    return tuple(value + by * (number == axis) for number, value in enumerate(start))


Fault = Callable[[Case], TransferPlan | None]


def dropped(case: Case) -> TransferPlan | None:
    index = case.random.randrange(len(case.plan.copies))
    return case.with_copies([*case.plan.copies[:index], *case.plan.copies[index + 1 :]])


def doubled(case: Case) -> TransferPlan | None:
    return case.with_copies([*case.plan.copies, case.random.choice(case.plan.copies)])


def shifted(case: Case) -> TransferPlan | None:
    index = case.random.randrange(len(case.plan.copies))
    end = case.random.choice(["source_start", "target_start"])
    start = getattr(case.plan.copies[index], end)
    axis = case.random.randrange(len(start))
    return case.with_copy(index, **{end: moved_along(start, axis, case.random.choice([-1, 1]))})


def shifted_at_both_ends(case: Case) -> TransferPlan | None:
    index = case.random.randrange(len(case.plan.copies))
    copy = case.plan.copies[index]
    ends = {
        end: moved_along(getattr(copy, end), len(getattr(copy, end)) - len(copy.shape), 1)
        for end in ("source_start", "target_start")
    }
    return case.with_copy(index, **ends)


def grown_or_shrunk(case: Case) -> TransferPlan | None:
    """Longer copies leak into padding or over their neighbours."""
    index = case.random.randrange(len(case.plan.copies))
    shape = case.plan.copies[index].shape
    by = case.random.choice([-1, 1])
    return case.with_copy(index, shape=moved_along(shape, case.random.randrange(len(shape)), by))


def moved_rows(case: Case, pattern: str, rows: Callable[[int], int]) -> TransferPlan | None:
    """A copy that reads its source storage some rows further on, around its end."""
    index = case.any_copy(pattern)
    if index is None:
        return None
    copy = case.plan.copies[index]
    ranks = case.topology.source.ranks[copy.source_rank]
    height = next(s.shape[0] for s in ranks.storages if s.name == copy.source_storage)
    start = copy.source_start
    new = (start[0] + rows(height)) % height
    return None if new == start[0] else case.with_copy(index, source_start=(new, *start[1:]))


def swapped_heads(case: Case) -> TransferPlan | None:
    # the next head of the fused matrix; after the key head, that is the value head
    return moved_rows(case, "linear_qkv", lambda _: case.topology.model.head_dim)


def keys_for_values(case: Case) -> TransferPlan | None:
    return moved_rows(case, "linear_qkv", lambda _: -case.topology.model.head_dim)


def gate_for_up(case: Case) -> TransferPlan | None:
    return moved_rows(case, "linear_fc1", lambda height: height // 2)


def renamed(case: Case, pattern: str) -> TransferPlan | None:
    """A copy from the storage of the same rank that differs in a number only."""
    index = case.any_copy(pattern)
    if index is None:
        return None
    copy = case.plan.copies[index]
    number = re.search(pattern, copy.source_storage)
    assert number is not None
    head, tail = copy.source_storage[: number.start(1)], copy.source_storage[number.end(1) :]
    others = [
        storage.name
        for storage in case.topology.source.ranks[copy.source_rank].storages
        if re.fullmatch(re.escape(head) + r"\d+" + re.escape(tail), storage.name)
        and storage.name != copy.source_storage
    ]
    return case.with_copy(index, source_storage=case.random.choice(others)) if others else None


def wrong_layer(case: Case) -> TransferPlan | None:
    return renamed(case, r"layers\.(\d+)\.")


def wrong_expert(case: Case) -> TransferPlan | None:
    return renamed(case, r"experts\..*?(\d+)$") or renamed(case, r"local_experts\.(\d+)\.")


def wrong_slot_of_an_expert(case: Case) -> TransferPlan | None:
    """A copy into the place of another expert of the stack."""
    stacked = [n for n, c in enumerate(case.plan.copies) if len(c.target_start) > len(c.shape)]
    if not stacked:
        return None
    index = case.random.choice(stacked)
    start = case.plan.copies[index].target_start
    by = -1 if start[0] else 1
    return case.with_copy(index, target_start=moved_along(start, 0, by))


def other_dtype(case: Case) -> TransferPlan | None:
    index = case.random.randrange(len(case.plan.copies))
    dtype = case.plan.copies[index].dtype
    return case.with_copy(index, dtype="fp32" if dtype is None else None)


def other_target_rank(case: Case) -> TransferPlan | None:
    num_ranks = len(case.topology.target.ranks)
    if num_ranks == 1:
        return None
    index = case.random.randrange(len(case.plan.copies))
    rank = (case.plan.copies[index].target_rank + 1) % num_ranks
    return case.with_copy(index, target_rank=rank)


def nowhere(case: Case) -> TransferPlan | None:
    index = case.random.randrange(len(case.plan.copies))
    name, value = case.random.choice(
        [
            ("source_rank", 99),
            ("target_rank", 99),
            ("source_storage", "unknown.weight"),
            ("target_storage", "unknown.weight"),
        ]
    )
    return case.with_copy(index, **{name: value})


def shared_before_it_arrives(case: Case) -> TransferPlan | None:
    """A share that reads what another share writes: right only in one of their orders."""
    shares = list(case.plan.shares)
    for number, share in enumerate(shares):
        for other in shares:
            if other.target_rank != share.target_rank and (
                (other.source_rank, other.source_storage, other.source_start, other.shape)
                == (share.source_rank, share.source_storage, share.source_start, share.shape)
            ):
                ends = {
                    "source_rank": other.target_rank,
                    "source_storage": other.target_storage,
                    "source_start": other.target_start,
                }
                shares[number] = replace(share, **ends)
                return case.with_moves(case.plan.copies, shares)
    return None


def shared_twice_over_the_wire(case: Case) -> TransferPlan | None:
    """A share that became a copy: right in every element, but more than the fewest bytes."""
    for number, share in enumerate(case.plan.shares):
        for copy in case.plan.copies:
            if (copy.target_rank, copy.target_box) == (share.source_rank, share.source_box) and (
                copy.target_storage == share.source_storage
            ):
                ends = {"target_rank": share.target_rank, "target_storage": share.target_storage}
                again = replace(copy, **ends, target_start=share.target_start)
                shares = [s for n, s in enumerate(case.plan.shares) if n != number]
                return case.with_moves([*case.plan.copies, again], shares)
    return None


def shared_across_nodes(case: Case) -> TransferPlan | None:
    if not case.plan.shares:
        return None
    return replace(case.plan, target_nodes=tuple(range(len(case.topology.target.ranks))))


def dropped_share(case: Case) -> TransferPlan | None:
    shares = case.plan.shares
    return case.with_moves(case.plan.copies, shares[1:]) if shares else None


ALWAYS_WRONG: tuple[Fault, ...] = (
    dropped,
    doubled,
    shifted,
    shifted_at_both_ends,
    grown_or_shrunk,
    swapped_heads,
    keys_for_values,
    gate_for_up,
    wrong_layer,
    wrong_expert,
    wrong_slot_of_an_expert,
    other_dtype,
    other_target_rank,
    nowhere,
    shared_before_it_arrives,
    shared_twice_over_the_wire,
    shared_across_nodes,
    dropped_share,
)


def other_source_rank(case: Case) -> TransferPlan | None:
    """Right if that rank is a replica and calls its storage the same."""
    index = case.random.randrange(len(case.plan.copies))
    return case.with_copy(index, source_rank=case.random.randrange(len(case.topology.source.ranks)))


def stale_layout(case: Case) -> TransferPlan | None:
    """The plan for a trainer whose ranks were numbered otherwise."""
    source = case.topology.source
    ranks = list(source.ranks)
    case.random.shuffle(ranks)
    stale = plan_transfer(
        Layout(source.kind, tuple(ranks)),
        case.topology.target,
        target_nodes=case.plan.target_nodes,
    )
    return replace(stale, source_id=source.layout_id)


def exchanged_sources(case: Case) -> TransferPlan | None:
    """Two copies of one shape read each other's place; right where these are replicas."""
    one = case.random.randrange(len(case.plan.copies))
    copies = list(case.plan.copies)
    alike = [n for n, c in enumerate(copies) if c.shape == copies[one].shape and n != one]
    if not alike:
        return None
    other = case.random.choice(alike)
    ends = ("source_rank", "source_storage", "source_start", "dtype")
    copies[one], copies[other] = (
        replace(copies[a], **{end: getattr(copies[b], end) for end in ends})
        for a, b in ((one, other), (other, one))
    )
    return case.with_copies(copies)


JUDGED: tuple[Fault, ...] = (other_source_rank, stale_layout, exchanged_sources)


def spoiled_rounds(rounds: list[Round], random: Random) -> dict[str, list[Round]]:
    """Rounds with one fault each."""

    def with_message(number: int, *messages: Message) -> list[Round]:
        others = tuple(m for m in rounds[number] if m is not chosen)
        return [*rounds[:number], (*others, *messages), *rounds[number + 1 :]]

    number = random.randrange(len(rounds))
    chosen = random.choice(rounds[number])
    first = chosen.copies[0]
    other = replace(first, dtype="fp32" if first.dtype is None else None)
    extra = replace(chosen, copies=(*chosen.copies, other))
    return {
        "lost message": with_message(number),
        "doubled round": [*rounds, rounds[number]],
        "doubled route": with_message(number, chosen, chosen),
        "elements of another dtype": with_message(number, extra),
        "dtype of the message": with_message(number, replace(chosen, dtype="fp8_e4m3")),
        "wrong route": with_message(
            number, replace(chosen, sender=chosen.receiver, receiver=chosen.sender)
        ),
        "wrong size": with_message(number, replace(chosen, num_bytes=chosen.num_bytes + 1)),
        "lost copy": with_message(
            number,
            replace(
                chosen, copies=chosen.copies[1:], num_bytes=chosen.num_bytes - first.num_elements
            ),
        ),
        "all at once": [tuple(message for one in rounds for message in one)],
    }
