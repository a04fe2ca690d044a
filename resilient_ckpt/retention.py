"""Which checkpoints are kept: a pure function, so that every case can be tested."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from resilient_ckpt.record import Checkpoint, Root

FALLBACKS = 1
"""How many checkpoints to continue from are kept besides the newest, in case that one does
not verify when it is needed."""


@dataclass(frozen=True)
class Sweep:
    """What is to be done with checkpoints.

    Attributes:
        delete: Those that nobody needs, oldest first.
        set_back: Those that are no longer wanted among the public ones, but still to fall
            back on.
    """

    delete: tuple[Checkpoint, ...] = ()
    set_back: tuple[Checkpoint, ...] = ()


@dataclass(frozen=True)
class RetentionPolicy:
    """What to keep.

    Args:
        max_to_keep: How many of the newest checkpoints; `None` keeps all.
        keep_best: How many of the best besides.
        mode: Whether a smaller (`"min"`) or larger (`"max"`) metric is better.
    """

    max_to_keep: int | None = 1
    keep_best: int = 0
    mode: str = "min"

    def sweep(
        self,
        checkpoints: Iterable[Checkpoint],
        verified: Collection[Path] = (),
        pinned: Collection[Path] = (),
        fallbacks: int = FALLBACKS,
    ) -> Sweep:
        """Decides what to delete.

        One that holds NaN or Inf counts for nothing and is kept only while no finite one
        is newer. One whose record is damaged is left for the next start to set aside. The newest
        finite checkpoint that a run can continue from is always kept,
        and so is the newest of these that is known to be good.

        Args:
            checkpoints: All that are there.
            verified: Directories of those known to be good: written or verified by this
                process.
            pinned: Directories of those that are in use.
            fallbacks: How many to continue from are kept besides the newest.

        Returns:
            What to do.
        """
        readable = (c for c in checkpoints if "damaged" not in c.record)
        ordered = sorted(readable, key=lambda checkpoint: checkpoint.order)
        finite = [checkpoint for checkpoint in ordered if checkpoint.finite]
        public = [checkpoint for checkpoint in finite if checkpoint.root is Root.PUBLIC]
        resumable = [checkpoint for checkpoint in finite if checkpoint.resumable]
        wanted = set(public if self.max_to_keep is None else public[-self.max_to_keep :])
        wanted.update(self._best(public))
        wanted.update(checkpoint for checkpoint in ordered[-1:] if not checkpoint.finite)
        if self.max_to_keep is None:
            wanted.update(c for c in ordered if c.root is Root.PUBLIC)
        wanted.update(checkpoint for checkpoint in ordered if checkpoint.path in pinned)
        needed = set(resumable[-1 - fallbacks :])
        needed.update([c for c in resumable if c.path in verified][-1:])
        return Sweep(
            delete=tuple(c for c in ordered if c not in wanted and c not in needed),
            set_back=tuple(c for c in ordered if c in needed - wanted and c.root is Root.PUBLIC),
        )

    def _best(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        measured = [c for c in checkpoints if c.metric is not None]
        sign = 1 if self.mode == "max" else -1
        # Of equals the older one stays: it was the best first.
        measured.sort(key=lambda c: (sign * (c.metric or 0.0), -c.step), reverse=True)
        return measured[: self.keep_best]
