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

from resilient_ckpt.errors import Preempted, SaveFailedError
from resilient_ckpt.lock import DirectoryLock
from resilient_ckpt.mirror import Mirror
from resilient_ckpt.policy import Progress, SavePolicy
from resilient_ckpt.record import Checkpoint, Root
from resilient_ckpt.resume import ProcessRun, ResumePoint, ResumeSearch
from resilient_ckpt.saves import Saves
from resilient_ckpt.signals import (
    NoticeKind,
    NoticeListener,
    PreemptionNotice,
    SignalSource,
)
from resilient_ckpt.store import CheckpointStore, SaveJob, Target
from resilient_ckpt.uploads import Uploads

logger = logging.getLogger(__name__)

RESCUE_AFTER_SECONDS = 1.0
"""How long the main thread may go on waiting for data after a notice before its state is
saved from another thread."""

SLOW_SAVE_SECONDS = 5.0
"""How much longer than usual a save under way may take before an emergency save passes it."""

UNKNOWN_GRACE_SECONDS = 20.0
"""How long the mirror is waited for after a notice that names no deadline."""

MIRROR_MARGIN_SECONDS = 2.0
"""How long before the deadline the mirror is not waited for any more."""

LEAVE_AFTER_SECONDS = 3.0
"""How long the main thread may go on waiting after that save from another thread, before the
process is ended under it."""

_TOO_LONG = "has taken longer than save_timeout_seconds"
_MIRROR_POLL_SECONDS = 1.0


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


class MainThreadWait(BaseException):
    """Raised in the main thread, by the signal handler, to end a wait for data."""


class Engine:
    """Saves one run.

    `open`, then `begin`; between batches `save_interval` where it is `due`, and after a
    notice `save_emergency` and `leave`; at the end `finish`, or `close` if it is another end.

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
        self.waiting_for_data = False
        self.rescue: Callable[[], tuple[Callable[[], Captured], Progress] | None] = lambda: None
        self.clock = clock
        self._wall_clock = wall_clock
        self._lock = DirectoryLock(store.directory)
        self._saves = Saves(store, self._lock, clock, self._time_for_retries)
        self._saves.on_commit = self._note_commit
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
            self._saves.committed = point.checkpoint
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
            self._saves.prepare(leaves)
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

    def _time_for_retries(self, emergency: bool) -> float:
        if emergency:
            return self._time_left()
        return math.inf if self.notice is None else 0.0

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
        self._saves.close()
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
    def committed(self) -> Checkpoint | None:
        """The newest commit."""
        return self._saves.committed

    @property
    def failed_saves(self) -> int:
        """How many saves have failed."""
        return self._saves.failed

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
        saves = self._saves
        saves.wait(self.options.save_timeout_seconds, until=self._noticed.is_set)
        if self.notice is not None:
            return  # The emergency checkpoint goes first.
        saves.give_up(_TOO_LONG)
        saves.check(self.options.max_failed_saves)
        if due:
            self.policy.saved(progress)
        captured = capture()
        public = not self.options.save_best_only or measurement.improved
        job = self._job(captured, progress, reason, measurement, public and not captured.transient)
        if self.options.background:
            saves.begin(job, captured.leaves)
        else:
            saves.attempt(job, captured.leaves)
            saves.check(self.options.max_failed_saves)

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
            saves = self._saves
            patience = 2 * saves.usual_seconds + SLOW_SAVE_SECONDS
            saves.wait(min(patience, self._time_left() / 2))
            saves.give_up("hangs; the emergency checkpoint does not wait for it")
            if self.is_committed(progress):
                return
            captured = capture()
            options = self.options
            public = not (options.save_best_only or options.save_weights_only or captured.transient)
            job = self._job(captured, progress, reason, Measurement(), public)
            saves.force(job, captured.leaves)

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
        self._saves.wait()

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
        self._uploads.submit_first(committed)
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
            SaveFailedError: If the newest state could not be saved, or not be mirrored.
            BaseException: After a notice that came when training had ended.
        """
        self._saves.wait(self.options.save_timeout_seconds)
        self._saves.give_up(_TOO_LONG)
        error = self._saves.last_error
        mirror_error = self._finish_mirror() if error is None else None
        if error is None:
            self.run.phase += 1
            self.run.histories.append(history)
        self.close()
        for problem, failed in ((error, "saved"), (mirror_error, "mirrored")):
            if problem is not None:
                raise SaveFailedError(
                    f"The last checkpoint could not be {failed} ({type(problem).__name__}: "
                    f"{problem}). {self._saves.newest()}"
                ) from problem
        if self.notice is not None:
            reason = self.leave()
            if reason is not None:
                raise reason

    def _finish_mirror(self) -> BaseException | None:
        """Uploads all that is kept, the newest last, and gives the error of that, if any."""
        uploads = self._uploads
        if uploads is None:
            return None
        try:
            uploads.submit(self.store.checkpoints())
            while not uploads.wait(_MIRROR_POLL_SECONDS):
                if self.notice is not None:
                    self.mirror_in_time()
                    return None
            if uploads.last_error is None:
                self.store.prune()  # what was kept only to be uploaded
        except OSError as error:  # of the local disk
            return error
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
        self._saves.wait(self.options.save_timeout_seconds)
        self._saves.give_up(_TOO_LONG)
        if self._uploads is not None:
            self._uploads.close()
        self._saves.close()
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

    def _note_commit(self, committed: Sequence[Checkpoint]) -> None:
        newest = committed[-1]
        self.run.step = max(self.run.step, newest.step)
        if newest.metric is not None:
            self._best.append(newest.metric)
        if self._uploads is not None:
            self._uploads.submit(committed)


def _moment(progress: Progress) -> tuple[int, int, int]:
    return (progress.step, progress.epoch, progress.batch)
