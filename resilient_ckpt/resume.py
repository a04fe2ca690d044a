"""Where a run continues: in this directory, or from its mirror."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient_ckpt.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    CheckpointsExistError,
)
from resilient_ckpt.mirror import Mirror, newer_than
from resilient_ckpt.record import Checkpoint
from resilient_ckpt.store import CheckpointStore

logger = logging.getLogger(__name__)


@dataclass
class ProcessRun:
    """What this process knows of the run in a directory, over several calls of `fit`."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    phase: int = 0
    step: int = 0
    histories: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run continues.

    Attributes:
        checkpoint: The checkpoint.
        trees: Its arrays, by checkpointable.
    """

    checkpoint: Checkpoint
    trees: Mapping[str, Any]


process_runs: dict[str, ProcessRun] = {}
"""By directory: a second `fit` of one process is another phase of the same run."""


class ResumeSearch:
    """Looks for the checkpoint to continue from.

    Args:
        store: The run's directory.
        mirror: Its mirror, if there is one.
        resume: `"auto"`, `"never"` or a step.
    """

    def __init__(self, store: CheckpointStore, mirror: Mirror | None, resume: str | int) -> None:
        self._store = store
        self._mirror = mirror
        self._resume = resume

    def find(self, names: Sequence[str]) -> tuple[ProcessRun, ResumePoint | None]:
        """Finds it, fetches it from the mirror if need be, and reads it.

        Args:
            names: The checkpointables to read.

        Returns:
            The run, and where it continues; `None` where there is nothing to continue.

        Raises:
            CheckpointsExistError: If `resume="never"` and there are checkpoints of another
                run, or if directory and mirror hold different runs.
            CheckpointNotFoundError: If the step asked for is not there, or no checkpoint
                restores.
        """
        key = str(self._store.directory.resolve())
        known = process_runs.get(key)
        local = self._store.retry.run(self._store.checkpoints, f"Reading {self._store.directory}")
        remote = self._remote_checkpoints(local)
        self._check_run(known, local, remote)
        if not isinstance(self._resume, str):
            remote = self._rewind_to(self._resume, local, remote)
        found = self._load(names, remote)
        if found is None:
            # Without checkpoints the directory was emptied, or nothing was saved: a new run.
            process_runs[key] = ProcessRun()
            return process_runs[key], None
        run_id = found[0].record.get("run", uuid.uuid4().hex)
        if known is None or known.run_id != run_id:
            known = process_runs[key] = ProcessRun(run_id)
        return known, ResumePoint(*found)

    def _remote_checkpoints(self, local: Sequence[Checkpoint]) -> list[Checkpoint]:
        if self._mirror is None:
            return []
        try:
            return self._mirror.checkpoints()
        except Exception as error:
            if not local:
                # Beginning anew, because of a failing network, would throw a run away.
                raise
            logger.warning(
                "The mirror %s cannot be read; continuing with what is in %s: %s",
                self._mirror.url,
                self._store.directory,
                error,
            )
            return []

    def _check_run(
        self, known: ProcessRun | None, local: Sequence[Checkpoint], remote: Sequence[Checkpoint]
    ) -> None:
        runs = {c.record["run"] for c in local if "run" in c.record}
        ours = known is not None and not runs - {known.run_id}
        if self._resume == "never" and (local or remote) and not ours:
            place = self._store.directory if local else self._mirror and self._mirror.url
            raise CheckpointsExistError(
                f'resume="never", but {place} holds checkpoints of another run: steps '
                f"{[c.step for c in local or remote]}. Choose another directory, or "
                'resume="auto" to continue that run.'
            )
        others = {c.record["run"] for c in remote if "run" in c.record}
        if runs and others and not runs & others:
            assert self._mirror is not None
            raise CheckpointsExistError(
                f"{self._mirror.url} holds checkpoints of another run than "
                f"{self._store.directory}. Choose another mirror, or another directory."
            )

    def _rewind_to(
        self, step: int, local: Sequence[Checkpoint], remote: Sequence[Checkpoint]
    ) -> list[Checkpoint]:
        """Sets aside what comes after a step; gives what is left of the mirror."""
        everywhere = sorted(
            (c for c in (*local, *remote) if c.resumable), key=lambda checkpoint: checkpoint.order
        )
        if everywhere and everywhere[-1].record.get("resume_request") == step:
            return list(remote)  # A restart of a run that had gone back to this step: it goes on.
        chosen = [c for c in everywhere if c.step == step]
        if not chosen:
            places = f" and {self._mirror.url}" if self._mirror is not None else ""
            raise CheckpointNotFoundError(
                f"resume={step}, but {self._store.directory}{places} hold no checkpoint of that "
                f"step to continue from; there are {sorted({c.step for c in everywhere})}."
            )
        why = f"The run was taken back to step {step}."
        for checkpoint in local:
            if checkpoint.order > chosen[-1].order:
                self._store.quarantine(checkpoint, why)
        left = []
        for checkpoint in remote:
            if checkpoint.order[:4] > chosen[-1].order[:4]:
                assert self._mirror is not None
                self._mirror.set_aside(checkpoint, why)
            else:
                left.append(checkpoint)
        return left

    def _load(
        self, names: Sequence[str], remote: Sequence[Checkpoint]
    ) -> tuple[Checkpoint, dict[str, Any]] | None:
        failure = None
        try:
            found = self._store.load_newest(names)
        except CheckpointNotFoundError as error:
            if not remote:
                raise
            found, failure = None, error
        for checkpoint in newer_than(remote, found[0] if found is not None else None):
            assert self._mirror is not None
            logger.info("Fetching step %d from the mirror %s.", checkpoint.step, self._mirror.url)
            try:
                self._store.adopt(
                    functools.partial(self._mirror.fetch, checkpoint),
                    checkpoint.root,
                    checkpoint.step,
                )
            except CheckpointDamagedError as error:
                logger.warning("%s", error)
                self._mirror.set_aside(checkpoint, str(error))
                continue
            return self._store.load_newest(names)
        if failure is not None:
            raise failure
        return found
