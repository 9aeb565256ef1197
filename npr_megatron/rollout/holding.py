"""What one replica holds of the fleet's weights: staged, served, lent to a peer.

Orders carry a term. ``begin_term`` drops what was staged and voids every order of an earlier term,
so one that was delayed, in the network or in a stopped process, cannot change anything later.

Two locks keep bytes whole: the shadow storages are written by one staging at a time and read by a
commit only when nobody writes them; the live storages are written by a commit and read by a loan.
A commit runs where the engine's steps run, everything else in the thread of its call.
"""

from __future__ import annotations

import threading

from npr_megatron.engine.interface import Engine
from npr_megatron.errors import StaleWeightsError
from npr_megatron.rollout.health import Stamp
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.tiles import Layout


class Holding:
    """The weights of ``engine`` and how they change.

    Args:
        source: layout of the trainer's publications.
        layout: layout of the engine's storages, and of what peers lend.
    """

    def __init__(self, engine: Engine, source: Layout, layout: Layout) -> None:
        self._engine = engine
        self._layout = layout
        self._receivers = {source.layout_id: Receiver(source, layout)}
        self._shadow = threading.Lock()
        self._live = threading.Lock()
        self._staged: Stamp | None = None
        self._loans: dict[str, Publisher] = {}
        self.serving: Stamp | None = None
        """What the engine serves; None before the first commit."""
        self.term = 0

    def stage(self, publication: Publication, term: int) -> Stamp:
        """Copy published weights into the shadow storages and verify them; return what they are.

        Raises:
            StaleWeightsError: layout, version or digest are not what the publication says, or
                ``term`` is over.
            DivergenceError: the weights are as published, and hold NaN or infinity.
        """
        stamp = Stamp(publication.version, publication.digest)
        with self._shadow:
            self._require(term, f"staging version {stamp.version}")
            self._staged = None
            receiver = self._receiver(publication)
            try:
                receiver.pull(publication, self._engine.staging())
            finally:
                if publication.source_layout_id == self._layout.layout_id:
                    receiver.close()  # a loan is read once, and kept in memory by its readers
            self._engine.seal()
            self._staged = stamp
        return stamp

    def commit(self, stamp: Stamp, term: int) -> None:
        """Make the staged weights live; to be called between two steps.

        Raises:
            StaleWeightsError: ``stamp`` is not what is staged, not newer than what is served, or
                ``term`` is over.
        """
        # Whoever holds the shadow is staging something else: no need to wait for it.
        is_free = self._shadow.acquire(blocking=False)
        try:
            self._require(term, f"committing version {stamp.version}")
            if not is_free or self._staged != stamp:
                raise StaleWeightsError(
                    f"commit of weight version {stamp.version} was asked for, staged is "
                    f"{self._staged}; stage that version first"
                )
            with self._live:
                self._engine.commit(stamp.version)
                self.serving, self._staged = stamp, None
        finally:
            if is_free:
                self._shadow.release()

    def drop_staged(self, stamp: Stamp) -> None:
        """Forget the staged weights if they are ``stamp``."""
        with self._shadow:
            if self._staged == stamp:
                self._staged = None

    def begin_term(self) -> int:
        """Drop what is staged, end all loans and void all orders so far, those being carried out
        included."""
        for loan in list(self._loans):
            self.end_loan(loan)
        with self._shadow:
            self.term += 1
            self._staged = None
        return self.term

    def lend(self, loan: str, arena_dir: str) -> Publication:
        """Publish what is served for a peer; a commit waits for the copy.

        Args:
            loan: its name, unique among living ones on the node; it takes memory until
                :meth:`end_loan`.

        Raises:
            StaleWeightsError: nothing is served yet.
            EnvironmentFault: no room in ``arena_dir``.
        """
        with self._live:
            if self.serving is None:
                raise StaleWeightsError(
                    "a replica was asked to lend its weights, it has none; push first"
                )
            publisher = Publisher(
                self._layout,
                0,
                next(iter(self._engine.weights.values())).dtype,
                run_id=loan,
                arena_dir=arena_dir,
            )
            self._loans[loan] = publisher
            part = publisher.publish(self.serving.version, self._engine.weights)
        return Publication.assemble([part])

    def end_loan(self, loan: str) -> None:
        """Free what :meth:`lend` took; safe to call twice."""
        publisher = self._loans.pop(loan, None)
        if publisher is not None:
            publisher.close()

    def _require(self, term: int, what: str) -> None:
        if term != self.term:
            raise StaleWeightsError(
                f"{what} was ordered in term {term}, it is term {self.term}; the order is void"
            )

    def _receiver(self, publication: Publication) -> Receiver:
        """Return the receiver for the layout of a publication; loans are planned at the first."""
        layout_id = publication.source_layout_id
        if layout_id == self._layout.layout_id and layout_id not in self._receivers:
            self._receivers[layout_id] = Receiver(self._layout, self._layout)
        if layout_id not in self._receivers:
            raise StaleWeightsError(
                f"version {publication.version} was published from layout {layout_id}, expected "
                f"was one of {', '.join(self._receivers)}; the trainer was laid out anew, start a "
                "fleet for its layout"
            )
        return self._receivers[layout_id]
