"""A shared budget stops branches late, never early."""

import random

from npr_megatron.engine.sglang.scheduler.budgets import BudgetBook, RoundBudget
from npr_megatron.engine.sglang.stage import Budget


def budget(branch: int, num_tokens: int, name: str = "t/1") -> Budget:
    return Budget(name=name, branch=branch, num_tokens=num_tokens)


def test_branches_in_step_stop_at_the_very_token():
    shared, taken = RoundBudget(), {1: 0, 2: 0, 3: 0}
    order = []
    open_branches = [1, 2, 3]
    while open_branches:
        for branch in list(open_branches):
            taken[branch] += 1
            order.append(branch)
            if shared.take(budget(branch, 7), taken[branch]):
                open_branches.remove(branch)
    # Rounds 1 and 2 are six tokens, the seventh is branch 1's; 2 and 3 learn of it a round later.
    assert taken == {1: 3, 2: 3, 3: 3}


def test_no_branch_stops_before_its_next_token_is_beyond_the_budget():
    rng = random.Random(0)
    for _ in range(300):
        shared = RoundBudget()
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
        num_tokens = rng.randint(1, 30)
        taken = [0] * len(lengths)
        stopped = [False] * len(lengths)
        while any(not s and t < n for s, t, n in zip(stopped, taken, lengths, strict=True)):
            branch = rng.randrange(len(lengths))
            if stopped[branch] or taken[branch] == lengths[branch]:
                continue
            taken[branch] += 1
            stopped[branch] = shared.take(budget(branch + 1, num_tokens), taken[branch])
        within = tokens_within(lengths, num_tokens)
        assert all(t >= w for t, w in zip(taken, within, strict=True))


def tokens_within(lengths: list[int], num_tokens: int) -> list[int]:
    """Count, round by round, what each branch takes before the budget ends."""
    taken = [0] * len(lengths)
    for round_ in range(max(lengths)):
        for branch, length in enumerate(lengths):
            if round_ < length and sum(taken) < num_tokens:
                taken[branch] += 1
    return taken


def test_a_block_is_forgotten_when_its_branches_have_ended():
    book = BudgetBook()
    assert not book.take(budget(1, 10), 1, has_ended=False)
    assert not book.take(budget(2, 10), 1, has_ended=False)
    assert not book.take(budget(2, 10), 2, has_ended=True)
    assert len(book) == 1, "branch 1 goes on, and what branch 2 took counts"
    assert not book.take(budget(1, 10), 7, has_ended=False)
    assert book.take(budget(1, 10), 8, has_ended=False)
    assert len(book) == 0
