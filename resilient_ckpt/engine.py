"""When to save, what to do at a notice, in which order. Knows no Keras."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilient_ckpt.child import ChildDiedError
from resilient_ckpt.errors import DirectoryInUseError, Preempted, SaveFailedError
from resilient_ckpt.lock import DirectoryLock
from resilient_ckpt.mirror import Mirror
from resilient_ckpt.policy import Progress, SavePolicy
from resilient_ckpt.record import Checkpoint, Root
from resilient_ckpt.resume import ProcessRun, ResumePoint, ResumeSearch
from resilient_ckpt.signals import (
    NoticeKind,
    NoticeListener,
    PreemptionNotice,
    SignalSource,
)
from resilient_ckpt.snapshot import HostBlock
from resilient_ckpt.store import CheckpointStore, SaveJob, Target
from resilient_ckpt.uploads import Uploads
from resilient_ckpt.writer import ProcessWriter

logger = logging.getLogger(__name__)

RESCUE_AFTER_SECONDS = 1.0
"""How long the main thread may go on waiting for data after a notice before its state is
saved from another thread."""

SLOW_SAVE_SECONDS = 5.0
"""How much longer than usual a save under way may take before an emergency save passes it."""

UNKNOWN_SAVE_SECONDS = 30.0
"""How long a save is expected to take before one was seen."""

UNKNOWN_GRACE_SECONDS = 20.0
"""How long the mirror is waited for after a notice that names no deadline."""

MIRROR_MARGIN_SECONDS = 2.0
"""How long before the deadline the mirror is not waited for any more."""

LEAVE_AFTER_SECONDS = 3.0
"""How long it may go on waiting after that save before the process is ended under it."""


_POLL_SECONDS = 0.05
_MIRROR_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Captured:
    """The state of a run at a moment between two batches.

    Attributes:
        leaves: Its arrays.
        trees: For each checkpointable of a full checkpoint, a nested dictionary of indices
            into `leaves`.
        weights_tree: The same for a weights-only checkpoint.
        weights: Indices of the arrays that must be finite.
        extras: Further checkpointables of a full public checkpoint.
        record: Position, random states and callbacks' states, as JSON values.
        transient: Whether it was taken during a validation, so that the step will come
            again.
    """

    leaves: Sequence[Any]
    trees: Mapping[str, Any]
    weights_tree: Mapping[str, Any]
    weights: tuple[int, ...]
    extras: Mapping[str, Any]
    record: Mapping[str, Any]
    transient: bool = False


@dataclass(frozen=True)
class Measurement:
    """The monitored value at a save.

    Attributes:
        value: The value, or `None` where it is not known.
        improved: Whether it is better than every one before.
    """

    value: float | None = None
    improved: bool = False


@dataclass(frozen=True)
class EngineOptions:
    """What to save, and how to leave.

    Attributes:
        save_best_only: Whether the public checkpoints are only the best ones.
        save_weights_only: Whether the public checkpoints hold the weights alone.
        keep_best: How many of the best checkpoints are kept besides the newest.
        mode: Whether a smaller (`"min"`) or larger (`"max"`) metric is better.
        background: Whether interval saves are written by the writer process.
        signals: The signals that mean preemption.
        grace_seconds: Seconds from such a signal to the kill, if known.
        on_preemption: `"exit"` or `"stop"`.
        exit_code: The exit code after a preemption; `None` for 128 + signal.
        resume: `"auto"`, `"never"` or a step.
        max_failed_saves: After how many failed interval saves in a row training ends.
        save_timeout_seconds: After how many seconds a save under way is given up; `None`
            waits for ever.
    """

    save_best_only: bool = False
    save_weights_only: bool = False
    keep_best: int = 0
    mode: str = "min"
    background: bool = True
    signals: tuple[int, ...] = (signal.SIGTERM,)
    grace_seconds: float | None = None
    on_preemption: str = "exit"
    exit_code: int | None = None
    resume: str | int = "auto"
    max_failed_saves: int | None = None
    save_timeout_seconds: float | None = 1800.0


@dataclass
class PendingSave:
    """A save under way in the background.

    Attributes:
        step: Its step.
        began: When it began, by the engine's clock.
        thread: Waits for it.
        abandoned: Whether nobody waits for it any more.
    """

    step: int
    began: float
    thread: threading.Thread | None = None
    abandoned: bool = False


class MainThreadWait(BaseException):
    """Raised in the main thread, by the signal handler, to end a wait for data."""


class Engine:
    """Saves one run.

    `open`, then `begin`, `at_boundary` between batches, and `close` at the end, whatever
    the end is.

    Args:
        store: Where to save.
        policy: When to save.
        options: What to save.
        clock: A monotonic clock, in seconds.
        wall_clock: The time, in seconds since the epoch.
    """

    def __init__(
        self,
        store: CheckpointStore,
        policy: SavePolicy,
        options: EngineOptions,
        mirror: Mirror | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.policy = policy
        self.options = options
        self.mirror = mirror
        self._uploads = Uploads(mirror, store) if mirror is not None else None
        self.notice: PreemptionNotice | None = None
        self._noticed = threading.Event()
        self.failed_saves = 0
        self.committed: Checkpoint | None = None
        self.waiting_for_data = False
        self.rescue: Callable[[], tuple[Callable[[], Captured], Progress] | None] = lambda: None
        self.clock = clock
        self._wall_clock = wall_clock
        self._lock = DirectoryLock(store.directory)
        self._block = HostBlock()
        self._writer = ProcessWriter()
        self._pending: PendingSave | None = None
        self._longest_save: float | None = None
        self._failed_in_a_row = 0
        self._last_error: BaseException | None = None
        self._saving = threading.RLock()
        self._timer: threading.Timer | None = None
        self._closing = threading.Event()
        self._listener: NoticeListener | None = None
        self._signals: SignalSource | None = None
        self._interrupts = 0
        self._begun_at: tuple[int, int, int] | None = None
        self._best: list[float] = []
        self.run = ProcessRun()

    # Opening.

    def open(self, names: Sequence[str]) -> ResumePoint | None:
        """Takes the directory and finds the checkpoint to continue from.

        Args:
            names: The checkpointables to read.

        Returns:
            The checkpoint, or `None` where there is nothing to continue.

        Raises:
            DirectoryInUseError: If another live process writes there.
            CheckpointsExistError: If `resume="never"` and there are checkpoints of another
                run.
            CheckpointNotFoundError: If the step asked for is not there, or no checkpoint
                restores.
            OSError: If the directory cannot be written.
        """
        self.store.create()
        self._lock.acquire()
        try:
            self.store.clean()
            search = ResumeSearch(self.store, self.mirror, self.options.resume)
            self.run, point = search.find(names)
        except BaseException:
            self._lock.release()
            raise
        self._best = [c.metric for c in self.store.checkpoints() if c.metric is not None]
        if point is not None:
            if self._uploads is not None:
                # An upload that the last process on this disk left half done.
                self._uploads.submit([point.checkpoint])
            self.committed = point.checkpoint
            self.run.step = max(self.run.step, point.checkpoint.step)
        return point

    # Running.

    def begin(self, progress: Progress, leaves: Sequence[Any]) -> None:
        """Begins to listen for notices and to count for the policy.

        Args:
            progress: Where training begins or continues.
            leaves: The arrays of the state; their shapes and dtypes count.
        """
        self._begun_at = _moment(progress)
        self.policy.start(progress)
        if self.options.background:
            self._block.reserve_for(leaves)
            if self._block.fd is not None:
                # It takes seconds to import what it needs; the first save should not wait.
                self._start_writer()
        signals = set(self.options.signals)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signals.add(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "fit() does not run in the main thread: signals are not heard, only what is "
                "saved at intervals is safe."
            )
            return
        self._signals = SignalSource(
            sorted(signals), self.options.grace_seconds, self._in_main_thread, self._wall_clock
        )
        self._listener = NoticeListener([self._signals], self._on_notice)
        self._listener.start()

    def _on_notice(self, notice: PreemptionNotice) -> None:
        if self.notice is not None:
            logger.warning("%s again; the checkpoint is being made.", notice.source)
            return
        self.notice = notice
        self._noticed.set()
        logger.warning("%s: saving a checkpoint, then leaving.", notice.source)
        self._timer = threading.Timer(RESCUE_AFTER_SECONDS, self._rescue)
        self._timer.daemon = True
        self._timer.name = "resilient-ckpt-rescue"
        self._timer.start()

    def _in_main_thread(self, number: int) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.waiting_for_data:
            raise MainThreadWait

    def expect_notice(self) -> None:
        """Waits for the notice of a signal that the main thread has heard already."""
        self._noticed.wait()

    def _time_left(self) -> float:
        """Seconds until the machine is gone, as far as is known."""
        if self.notice is None or self.notice.deadline is None:
            return math.inf
        return self.notice.deadline - self._wall_clock()

    def _rescue(self) -> None:
        """Saves while the main thread hangs in a read that no signal interrupts."""
        if not self.waiting_for_data:
            return
        try:
            with self._saving:
                state = self.rescue() if self.waiting_for_data else None
                if state is None:
                    return
                self.save_emergency(*state)
        except Exception:
            logger.exception("The emergency save failed; it is tried again between batches.")
            return
        if not self._closing.wait(LEAVE_AFTER_SECONDS) and self.waiting_for_data:
            self._end_process()

    def _end_process(self) -> None:
        """Leaves for the main thread, which hangs where no exception reaches it."""
        error = self.leave()
        if not isinstance(error, Preempted):
            logger.warning("The main thread hangs in its data source; the process stays.")
            return
        logger.warning("The main thread hangs in its data source; ending the process.")
        self.mirror_in_time()
        self._writer.close()
        self._lock.release()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        assert isinstance(error.code, int)
        os._exit(error.code)

    def wall_now(self) -> float:
        """The time, in seconds since the epoch."""
        return self._wall_clock()

    @property
    def failed_uploads(self) -> int:
        """How many uploads to the mirror have failed."""
        return self._uploads.failed if self._uploads is not None else 0

    def due(self, progress: Progress) -> bool:
        """Whether the policy wants a save now."""
        return self.policy.due(progress)

    def save_interval(
        self,
        progress: Progress,
        capture: Callable[[], Captured],
        measurement: Measurement,
        reason: str,
        due: bool,
    ) -> None:
        """Saves in the background what the policy, or a best value, called for.

        A failure does not end training: it is logged, counted in `failed_saves`, and made
        good at the next interval.

        Args:
            progress: The moment.
            capture: Gives the state.
            measurement: The monitored value at this moment.
            reason: Why, for the record.
            due: Whether the policy called for it (and not only a best value).

        Raises:
            DirectoryInUseError: If another process has taken the directory over.
            SaveFailedError: If more than `max_failed_saves` failed in a row.
        """
        self._wait(self.options.save_timeout_seconds, until_notice=True)
        if self.notice is not None:
            return  # The emergency checkpoint goes first.
        self._give_up_pending("has taken longer than save_timeout_seconds")
        self._check_failures()
        if due:
            self.policy.saved(progress)
        captured = capture()
        public = not self.options.save_best_only or measurement.improved
        job = self._job(captured, progress, reason, measurement, public and not captured.transient)
        pending = PendingSave(progress.step, self.clock())
        if not self.options.background:
            self._attempt(pending, job, lambda: self._save_here(job, captured.leaves))
            self._check_failures()
            return
        self._block.copy_in(captured.leaves)
        if self._block.fd is None:
            arrays = self._block.arrays()
            work = lambda: self._save_here(job, arrays)  # noqa: E731
        else:
            self._start_writer()
            work = lambda: self._save_there(pending, job)  # noqa: E731
        pending.thread = threading.Thread(
            target=self._attempt, args=(pending, job, work), name="resilient-ckpt-save", daemon=True
        )
        self._pending = pending
        pending.thread.start()

    def save_emergency(
        self, capture: Callable[[], Captured], progress: Progress, reason: str = "emergency"
    ) -> None:
        """Saves and commits now, unless this very moment is committed already.

        Args:
            capture: Gives the state; called only if it is needed.
            progress: The moment.
            reason: Why, for the record.

        Raises:
            SaveFailedError: If it cannot be saved.
        """
        with self._saving:
            usual = UNKNOWN_SAVE_SECONDS if self._longest_save is None else self._longest_save
            self._wait(min(2 * usual + SLOW_SAVE_SECONDS, self._time_left() / 2))
            self._give_up_pending("hangs; the emergency checkpoint does not wait for it")
            if self.is_committed(progress):
                return
            captured = capture()
            options = self.options
            public = not (options.save_best_only or options.save_weights_only or captured.transient)
            job = self._job(captured, progress, reason, Measurement(), public)
            try:
                self._lock.check()
                committed = self._save_here(job, captured.leaves, emergency=True)
            except Exception as error:
                raise SaveFailedError(
                    f"The {reason} checkpoint of step {progress.step} could not be saved "
                    f"({type(error).__name__}: {error}). {self._newest()}"
                ) from error
            self._note_commit(committed)
            if self._uploads is not None:
                self._uploads.submit_first(committed)

    def is_committed(self, progress: Progress) -> bool:
        """Whether this moment needs no save: it is committed, or nothing was run yet."""
        moment = _moment(progress)
        if moment == self._begun_at:
            return True
        if self.committed is None:
            return False
        record = self.committed.record
        return (
            record.get("phase", 0) == self.run.phase
            and (self.committed.step, record.get("epoch"), record.get("batch")) == moment
        )

    def would_be_best(self, value: float | None) -> bool:
        """Whether a checkpoint with this metric would be among the best that are kept."""
        if value is None or not self.options.keep_best:
            return False
        sign = 1 if self.options.mode == "max" else -1
        kept = sorted((sign * best for best in self._best), reverse=True)
        return len(kept) < self.options.keep_best or sign * value > kept[self.options.keep_best - 1]

    def wait(self) -> None:
        """Waits until the save under way has ended, well or badly."""
        self._wait(None)

    def _wait(self, seconds: float | None, until_notice: bool = False) -> None:
        pending = self._pending
        if pending is None or pending.thread is None:
            return
        if pending.thread is threading.current_thread():
            return
        began = self.clock()
        while pending.thread.is_alive():
            if seconds is not None and self.clock() - began >= seconds:
                return
            if until_notice and self.notice is not None:
                return
            pending.thread.join(_POLL_SECONDS)
        self._pending = None

    def _give_up_pending(self, why: str) -> None:
        """Ends a save that is still under way, for another to take its place."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.abandoned = True
        error = TimeoutError(f"the save {why} ({self.clock() - pending.began:.0f} s)")
        self._note_failure(pending.step, error)
        if self._block.fd is None:
            self._block = HostBlock()  # The thread goes on reading the old one.
        self._writer.close()

    # Ending.

    def mirror_in_time(self) -> None:
        """Waits for the mirror, after an emergency checkpoint, as long as the grace allows.

        What is left is finished by the next process on this disk.
        """
        notice, committed = self.notice, self.committed
        if self._uploads is None or committed is None:
            return
        if notice is not None and notice.kind is NoticeKind.INTERRUPT:
            return  # Nobody takes the machine away; nor is anybody to be kept waiting.
        left = self._time_left() - MIRROR_MARGIN_SECONDS
        if not self._uploads.wait(UNKNOWN_GRACE_SECONDS if math.isinf(left) else max(0.0, left)):
            logger.warning(
                "The time is too short for the mirror: step %d is committed in %s only.",
                committed.step,
                self.store.directory,
            )

    def leave(self) -> BaseException | None:
        """What to raise after the emergency checkpoint.

        Returns:
            The exception of an earlier signal handler, `KeyboardInterrupt`, `Preempted`,
            or `None` where `fit` is to return.
        """
        notice = self.notice
        if notice is None:
            raise RuntimeError("There was no notice.")
        if self._signals is not None and self._signals.deferred_exception is not None:
            return self._signals.deferred_exception
        if notice.kind is NoticeKind.INTERRUPT:
            return KeyboardInterrupt()
        if self.options.on_preemption == "stop":
            return None
        code = self.options.exit_code
        if code is None:
            signum = notice.detail.get("signum")
            code = 128 + signum if isinstance(signum, int) else 1
        return Preempted(code, notice.source, self.committed.step if self.committed else None)

    def finish(self, history: Any) -> None:
        """Ends a `fit` that ran to its end.

        Args:
            history: Its History, remembered for the restart of a script with several calls
                of `fit`.

        Raises:
            SaveFailedError: If the newest state could not be saved.
        """
        self._wait(self.options.save_timeout_seconds)
        self._give_up_pending("has taken longer than save_timeout_seconds")
        error = self._last_error
        mirrored = self._finish_mirror()
        if error is None:
            self.run.phase += 1
            self.run.histories.append(history)
        self.close()
        if error is not None:
            raise SaveFailedError(
                f"The last checkpoint could not be saved ({type(error).__name__}: {error}). "
                f"{self._newest()}"
            ) from error
        if mirrored is not None:
            raise SaveFailedError(
                f"The last checkpoint could not be mirrored ({type(mirrored).__name__}: "
                f"{mirrored}); {self._newest()}"
            ) from mirrored

    def _finish_mirror(self) -> BaseException | None:
        """Uploads all that is kept, the newest last, and gives the error of that, if any."""
        uploads = self._uploads
        if uploads is None:
            return None
        kept = self.store.checkpoints()
        if kept:
            uploads.submit(kept)
        while not uploads.wait(_MIRROR_REPORT_SECONDS):
            logger.info("Waiting for the mirror.")
        if uploads.last_error is None:
            self.store.prune()  # what was kept only to be uploaded
        return uploads.last_error

    def close(self) -> None:
        """Finishes the save under way and puts everything back. May be called twice."""
        self._closing.set()
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        if self._timer is not None:
            self._timer.cancel()
            if self._timer is not threading.current_thread():
                self._timer.join()
            self._timer = None
        self._wait(self.options.save_timeout_seconds)
        self._give_up_pending("has taken longer than save_timeout_seconds")
        if self._uploads is not None:
            self._uploads.close()
        self._writer.close()
        self._block.close()
        self._lock.release()

    # Saving.

    def _job(
        self,
        captured: Captured,
        progress: Progress,
        reason: str,
        measurement: Measurement,
        public: bool,
    ) -> SaveJob:
        value = measurement.value
        record = {
            **captured.record,
            "run": self.run.run_id,
            "phase": self.run.phase,
            "phases": self.run.histories,
            "step": progress.step,
            "epoch": progress.epoch,
            "batch": progress.batch,
            "reason": reason,
            "source": self.notice.source if self.notice is not None else None,
            "saved_at": self._wall_clock(),
            "metric": value if value is not None and math.isfinite(value) else None,
            "policy": self.policy.get_state(),
            "resume_request": self.options.resume if self.options.resume != "auto" else None,
        }
        targets = []
        weights_only = self.options.save_weights_only
        if public:
            targets.append(
                Target(
                    Root.PUBLIC,
                    progress.step,
                    {"pytree": captured.weights_tree} if weights_only else captured.trees,
                    {} if weights_only else captured.extras,
                    resumable=not weights_only,
                )
            )
        if not public or weights_only:
            targets.append(Target(Root.RESUME, progress.step, captured.trees))
        return SaveJob(tuple(targets), record, captured.weights)

    def _attempt(
        self, pending: PendingSave, job: SaveJob, save: Callable[[], list[Checkpoint]]
    ) -> None:
        try:
            self._lock.check()
            committed = save()
        except Exception as error:  # noqa: BLE001 - logged, counted, raised at the end
            if not pending.abandoned:  # else it is counted already
                self._note_failure(pending.step, error)
        else:
            taken = self.clock() - pending.began
            self._longest_save = max(taken, self._longest_save or 0.0)
            self._note_commit(committed)

    def _note_failure(self, step: int, error: BaseException) -> None:
        self._last_error = error
        self.failed_saves += 1
        self._failed_in_a_row += 1
        logger.error("Saving step %d failed (%d in all): %s", step, self.failed_saves, error)

    def _note_commit(self, committed: list[Checkpoint]) -> None:
        newest = committed[-1]
        self.store.verified.update(checkpoint.path for checkpoint in committed)
        logger.info("Committed step %d (%s).", newest.step, newest.path)
        if newest.metric is not None:
            self._best.append(newest.metric)
        if self.committed is not None and newest.order < self.committed.order:
            return  # One that had been given up came through after all.
        self.committed = newest
        self.run.step = max(self.run.step, newest.step)
        self._failed_in_a_row = 0
        self._last_error = None
        if self._uploads is not None:
            self._uploads.submit(committed)

    def _check_failures(self) -> None:
        if isinstance(self._last_error, DirectoryInUseError):
            raise self._last_error
        limit = self.options.max_failed_saves
        if limit is not None and self._failed_in_a_row > limit:
            raise SaveFailedError(
                f"{self._failed_in_a_row} saves failed in a row, more than max_failed_saves="
                f"{limit}. {self._newest()}"
            ) from self._last_error

    def _start_writer(self) -> None:
        if not self._writer.running:
            self._writer.start()
            if self._writer.pid is not None:
                self._lock.add_writer(self._writer.pid)

    def _save_here(
        self, job: SaveJob, leaves: Sequence[Any], emergency: bool = False
    ) -> list[Checkpoint]:
        arrays = [np.asarray(leaf) for leaf in leaves]

        def time_left() -> float:
            if emergency:
                return self._time_left()
            return math.inf if self.notice is None else 0.0

        return self.store.save(job, arrays, time_left)

    def _save_there(self, pending: PendingSave, job: SaveJob) -> list[Checkpoint]:
        try:
            return self._writer.write(self.store, job, self._block)
        except ChildDiedError as error:
            if pending.abandoned:
                raise
            logger.warning("%s Saving from this process instead.", error)
            return self._save_here(job, self._block.arrays())

    def _newest(self) -> str:
        if self.committed is None:
            return "There is no earlier checkpoint."
        return f"The newest good checkpoint is step {self.committed.step} ({self.committed.path})."


def _moment(progress: Progress) -> tuple[int, int, int]:
    return (progress.step, progress.epoch, progress.batch)
