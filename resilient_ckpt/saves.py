"""Saving one state after the other, here or in the writer process, and counting failures."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilient_ckpt.child import ChildDiedError
from resilient_ckpt.errors import DirectoryInUseError, SaveFailedError
from resilient_ckpt.lock import DirectoryLock
from resilient_ckpt.record import Checkpoint
from resilient_ckpt.snapshot import HostBlock
from resilient_ckpt.store import CheckpointStore, SaveJob
from resilient_ckpt.writer import ProcessWriter

logger = logging.getLogger(__name__)

UNKNOWN_SAVE_SECONDS = 30.0
"""How long a save is expected to take before one was seen."""

_POLL_SECONDS = 0.05


@dataclass
class _Pending:
    """A save under way in the background."""

    step: int
    began: float
    thread: threading.Thread | None = None
    abandoned: bool = False


class Saves:
    """Makes the saves of one run; there is never more than one under way.

    Args:
        store: Where to save.
        lock: The lock on its directory.
        clock: A monotonic clock, in seconds.
        time_left: Seconds left for retries; given whether it is an emergency.
        committed: The newest commit, of a run that continues.

    Attributes:
        committed: The newest commit, or `None`.
        failed: How many saves have failed.
        last_error: Why the newest one failed; `None` if it did not.
    """

    def __init__(
        self,
        store: CheckpointStore,
        lock: DirectoryLock,
        clock: Callable[[], float],
        time_left: Callable[[bool], float],
    ) -> None:
        self.committed: Checkpoint | None = None
        self.failed = 0
        self.last_error: BaseException | None = None
        self.on_commit: Callable[[Sequence[Checkpoint]], None] = lambda committed: None
        self._store = store
        self._lock = lock
        self._clock = clock
        self._time_left = time_left
        self._block = HostBlock()
        self._writer = ProcessWriter()
        self._pending: _Pending | None = None
        self._longest: float | None = None
        self._failed_in_a_row = 0

    @property
    def usual_seconds(self) -> float:
        """How long a save takes, by the longest so far."""
        return UNKNOWN_SAVE_SECONDS if self._longest is None else self._longest

    def prepare(self, leaves: Sequence[Any]) -> None:
        """Reserves what saving in the background needs, so that the first save need not wait.

        Args:
            leaves: The arrays of the state; their shapes and dtypes count.
        """
        self._block.reserve_for(leaves)
        if self._block.fd is not None:
            self._start_writer()

    def begin(self, job: SaveJob, leaves: Sequence[Any]) -> None:
        """Saves in the background; the arrays may be changed as soon as this returns.

        Args:
            job: What to save.
            leaves: The arrays.
        """
        pending = _Pending(job.targets[0].step, self._clock())
        self._block.copy_in(leaves)
        if self._block.fd is None:
            arrays = self._block.arrays()
            save = lambda: self._save_here(job, arrays, emergency=False)  # noqa: E731
        else:
            self._start_writer()
            save = lambda: self._save_there(pending, job)  # noqa: E731
        pending.thread = threading.Thread(
            target=self._attempt, args=(pending, save), name="resilient-ckpt-save", daemon=True
        )
        self._pending = pending
        pending.thread.start()

    def attempt(self, job: SaveJob, leaves: Sequence[Any]) -> None:
        """Saves before it returns; a failure is logged and counted.

        Args:
            job: What to save.
            leaves: The arrays.
        """
        pending = _Pending(job.targets[0].step, self._clock())
        self._attempt(pending, lambda: self._save_here(job, leaves, emergency=False))

    def force(self, job: SaveJob, leaves: Sequence[Any]) -> None:
        """Saves before it returns, or raises.

        Args:
            job: What to save.
            leaves: The arrays.

        Raises:
            SaveFailedError: If it cannot be saved.
        """
        try:
            self._lock.check()
            committed = self._save_here(job, leaves, emergency=True)
        except Exception as error:
            raise SaveFailedError(
                f"The {job.record.get('reason')} checkpoint of step {job.targets[0].step} could "
                f"not be saved ({type(error).__name__}: {error}). {self.newest()}"
            ) from error
        self._note_commit(committed)

    def wait(self, seconds: float | None = None, until: Callable[[], bool] = lambda: False) -> None:
        """Waits until the save under way has ended, well or badly.

        Args:
            seconds: At most so long; `None` for as long as it takes.
            until: Ends the wait, too.
        """
        pending = self._pending
        if pending is None or pending.thread in (None, threading.current_thread()):
            return
        assert pending.thread is not None
        began = self._clock()
        while pending.thread.is_alive():
            if (seconds is not None and self._clock() - began >= seconds) or until():
                return
            pending.thread.join(_POLL_SECONDS)
        self._pending = None

    def give_up(self, why: str) -> None:
        """Ends a save that is still under way, for another to take its place.

        Args:
            why: What is wrong with it.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.abandoned = True
        error = TimeoutError(f"the save {why} ({self._clock() - pending.began:.0f} s)")
        self._note_failure(pending.step, error)
        if self._block.fd is None:
            self._block = HostBlock()  # The thread goes on reading the old one.
        self._writer.close()

    def check(self, max_failed: int | None) -> None:
        """Judges what happened in the background.

        Args:
            max_failed: How many failures in a row are borne; `None` bears all.

        Raises:
            DirectoryInUseError: If another process has taken the directory over.
            SaveFailedError: If there were more failures in a row.
        """
        if isinstance(self.last_error, DirectoryInUseError):
            raise self.last_error
        if max_failed is not None and self._failed_in_a_row > max_failed:
            raise SaveFailedError(
                f"{self._failed_in_a_row} saves failed in a row, more than max_failed_saves="
                f"{max_failed}. {self.newest()}"
            ) from self.last_error

    def newest(self) -> str:
        """Says which checkpoint is the newest good one, for an error."""
        if self.committed is None:
            return "There is no earlier checkpoint."
        return f"The newest good checkpoint is step {self.committed.step} ({self.committed.path})."

    def close(self) -> None:
        """Gives memory and process back; nothing is under way any more."""
        self._writer.close()
        self._block.close()

    def _attempt(self, pending: _Pending, save: Callable[[], list[Checkpoint]]) -> None:
        try:
            self._lock.check()
            committed = save()
        except Exception as error:  # noqa: BLE001 - logged, counted, raised at the end
            if not pending.abandoned:  # else it is counted already
                self._note_failure(pending.step, error)
        else:
            self._longest = max(self._clock() - pending.began, self._longest or 0.0)
            self._note_commit(committed)

    def _note_failure(self, step: int, error: BaseException) -> None:
        self.last_error = error
        self.failed += 1
        self._failed_in_a_row += 1
        logger.error("Saving step %d failed (%d in all): %s", step, self.failed, error)

    def _note_commit(self, committed: list[Checkpoint]) -> None:
        newest = committed[-1]
        self._store.verified.update(checkpoint.path for checkpoint in committed)
        logger.info("Committed step %d (%s).", newest.step, newest.path)
        if self.committed is not None and newest.order < self.committed.order:
            return  # One that had been given up came through after all.
        self.committed = newest
        self._failed_in_a_row = 0
        self.last_error = None
        self.on_commit(committed)

    def _start_writer(self) -> None:
        if not self._writer.running:
            self._writer.start()
            if self._writer.pid is not None:
                self._lock.add_writer(self._writer.pid)

    def _save_here(self, job: SaveJob, leaves: Sequence[Any], emergency: bool) -> list[Checkpoint]:
        arrays = [np.asarray(leaf) for leaf in leaves]
        return self._store.save(job, arrays, lambda: self._time_left(emergency))

    def _save_there(self, pending: _Pending, job: SaveJob) -> list[Checkpoint]:
        try:
            return self._writer.write(self._store, job, self._block)
        except ChildDiedError as error:
            if pending.abandoned:
                raise
            logger.warning("%s Saving from this process instead.", error)
            return self._save_here(job, self._block.arrays(), emergency=False)
