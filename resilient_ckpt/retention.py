"""Which checkpoints are kept: a pure function, so that every case can be tested."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resilient_ckpt.record import Checkpoint, Root

RESUME_CHECKPOINTS_KEPT = 2
"""One to continue from, and an older one in case it does not restore."""


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

    def superfluous(self, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
        """The checkpoints that may be deleted.

        One that holds NaN or Inf counts for nothing and is kept only while no finite one
        is newer. The newest finite checkpoint that a run can continue from is never
        superfluous.

        Args:
            checkpoints: All that are there.

        Returns:
            Those to delete, oldest first.
        """
        ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.order)
        finite = [checkpoint for checkpoint in ordered if checkpoint.finite]
        public = [checkpoint for checkpoint in finite if checkpoint.root is Root.PUBLIC]
        resume = [checkpoint for checkpoint in finite if checkpoint.root is Root.RESUME]
        kept = set(public if self.max_to_keep is None else public[-self.max_to_keep :])
        kept.update(resume[-RESUME_CHECKPOINTS_KEPT:])
        kept.update(self._best(public))
        resumable = [checkpoint for checkpoint in finite if checkpoint.resumable]
        kept.update(resumable[-1:])
        kept.update(checkpoint for checkpoint in ordered[-1:] if not checkpoint.finite)
        if self.max_to_keep is None:
            kept.update(c for c in ordered if c.root is Root.PUBLIC)
        return [checkpoint for checkpoint in ordered if checkpoint not in kept]

    def _best(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        measured = [c for c in checkpoints if c.metric is not None]
        sign = 1 if self.mode == "max" else -1
        # Of equals the older one stays: it was the best first.
        measured.sort(key=lambda c: (sign * (c.metric or 0.0), -c.step), reverse=True)
        return measured[: self.keep_best]
