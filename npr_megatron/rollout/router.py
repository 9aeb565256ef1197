"""Which replica decodes which request: pure and deterministic.

Rollouts of one prompt stay together, because an engine reuses the prompt's keys and values among
them. Prompts go to the replica with the least estimated work, longest prompts group first, which
keeps the worst replica within 4/3 of the best possible balance (Graham's bound for this rule).
Samples do not depend on the route: every request carries its seed. A group is split only where
there are fewer groups than replicas; an idle replica costs more than a prompt computed twice.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from npr_megatron.records.request import GenerationRequest

Share = tuple[GenerationRequest, ...]


def split_requests(requests: Sequence[GenerationRequest], num_replicas: int) -> tuple[Share, ...]:
    """Return one share per replica (some may be empty); together they are ``requests``, each once.

    Inside a share, requests keep their order.
    """
    if num_replicas < 1:
        raise ValueError(f"requests need at least one replica, got {num_replicas}")
    groups = _groups(requests, num_replicas)
    groups.sort(key=lambda group: -sum(_work_tokens(requests[index]) for index in group))
    loads = [(0, replica) for replica in range(num_replicas)]
    chosen: list[list[int]] = [[] for _ in range(num_replicas)]
    for group in groups:
        load, replica = loads[0]
        heapq.heapreplace(
            loads, (load + sum(_work_tokens(requests[index]) for index in group), replica)
        )
        chosen[replica].extend(group)
    return tuple(tuple(requests[index] for index in sorted(share)) for share in chosen)


def _groups(requests: Sequence[GenerationRequest], num_replicas: int) -> list[list[int]]:
    by_prompt: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, request in enumerate(requests):
        by_prompt.setdefault((request.prompt_id, request.prompt_ids), []).append(index)
    groups = list(by_prompt.values())
    if len(groups) >= num_replicas:
        return groups
    pieces = -(-num_replicas // max(1, len(groups)))
    return [group[piece::pieces] for group in groups for piece in range(pieces) if group[piece:]]


def _work_tokens(request: GenerationRequest) -> int:
    """Upper bound of the tokens an engine computes for ``request``."""
    return len(request.prompt_ids) + request.max_new_tokens
