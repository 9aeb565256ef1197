"""What a client and SGLang's ranks say to each other about weights; the weights go by memory.

SGLang carries named tensors to a weight loader, so an order travels as a name, of a tensor without
numbers: memory that torch shares between processes can be taken once, and every data-parallel rank
is given the same message. A rank answers in memory that the client reads when SGLang says that the
order is carried out: SGLang itself hands back a flag only, and ends its processes when a loader
raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.sglang.weights.shared_bytes import SharedBytes, writable_memory
from npr_megatron.errors import EnvironmentFault
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.tiles import Layout

_REPORT_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one tensor-parallel rank is to do with its parameters, in every data-parallel rank.

    With a ``publication`` it takes them from there; without one it says whether they are laid out
    as expected.
    """

    serial: int
    """Counts the orders of a client: an answer to an earlier one is none to this."""
    model: ModelConfig
    rank: int
    tp_size: int
    reports: str
    """Path of the memory for answers."""
    publication: Publication | None = None
    """Of the host's copy."""
    shares: tuple[int, ...] | None = None
    """What this rank's part contributes to the digest; with a ``publication``."""

    @property
    def ranks(self) -> Layout:
        """How SGLang's ranks hold the model."""
        return engine_layout(self.model, self.tp_size, engine="sglang")

    @property
    def host(self) -> Layout:
        """How the host holds it."""
        return engine_layout(self.model, engine="sglang")

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return the order as what SGLang carries."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["model"] = self.model.model_dump(mode="json")
        if self.publication is not None:
            fields["publication"] = asdict(self.publication)
        return [(json.dumps(fields), torch.empty(0))]

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, Tensor]]) -> Order:
        """Read an order back."""
        [(text, _)] = tensors
        fields: dict[str, Any] = json.loads(text)
        fields["model"] = ModelConfig.model_validate(fields["model"])
        if (told := fields["publication"]) is not None:
            fields["publication"] = Publication(
                **{**told, "arena_paths": tuple(told["arena_paths"])}
            )
        if fields["shares"] is not None:
            fields["shares"] = tuple(fields["shares"])
        return cls(**fields)

    def report(self, dp_rank: int, problem: str = "") -> None:
        """Tell the client that data-parallel rank ``dp_rank`` has carried the order out, or why it
        has not.
        """
        said = {"serial": self.serial, "problem": problem[: _REPORT_BYTES // 8]}
        text = json.dumps(said).encode().ljust(_REPORT_BYTES, b"\0")
        pages = writable_memory(self.reports).view(-1, _REPORT_BYTES)
        pages[dp_rank * self.tp_size + self.rank].copy_(
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
        )


class Reports:
    """Where the ranks of an engine answer.

    Args:
        num_ranks: of all data-parallel ranks together.
    """

    def __init__(self, num_ranks: int) -> None:
        self._bytes = SharedBytes("reports", num_ranks * _REPORT_BYTES)

    @property
    def path(self) -> str:
        """Where ranks map it."""
        return self._bytes.path

    def problems(self, serial: int) -> list[str]:
        """Return what the ranks had to say against order ``serial``, each thing once.

        Raises:
            EnvironmentFault: a rank never saw the order.
        """
        found: dict[str, None] = {}
        for rank, said in enumerate(self._said()):
            if said["serial"] != serial:
                raise EnvironmentFault(
                    f"order {serial} about weights was given to SGLang, its rank {rank} did not "
                    "carry it out; this version of SGLang does not call custom weight loaders"
                )
            if said["problem"]:
                found[said["problem"]] = None
        return list(found)

    def last_words(self, serial: int) -> str:
        """Return what ranks said about order ``serial`` before their processes ended."""
        words = {said["problem"]: None for said in self._said() if said["serial"] == serial}
        return "\n".join(word for word in words if word)

    def _said(self) -> Iterator[dict[str, Any]]:
        for page in self._bytes.memory.view(-1, _REPORT_BYTES):
            text = page.numpy().tobytes().rstrip(b"\0")
            yield json.loads(text) if text else {"serial": None, "problem": ""}

    def close(self) -> None:
        """Let go of the memory; safe to call twice."""
        self._bytes.close()
