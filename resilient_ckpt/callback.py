"""The Keras callback: turns Keras' events into calls. It decides nothing of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import keras
from keras.src.callbacks.monitor_callback import MonitorCallback

from resilient_ckpt.durability import DURABILITIES, Durability
from resilient_ckpt.engine import Engine, EngineOptions, Measurement
from resilient_ckpt.fit_call import find_callback_list, find_fit
from resilient_ckpt.mirror import Mirror, staging_directory
from resilient_ckpt.policy import SavePolicy, policy_from
from resilient_ckpt.record import Root
from resilient_ckpt.retention import RetentionPolicy
from resilient_ckpt.retry import RetryPolicy
from resilient_ckpt.session import FitSession
from resilient_ckpt.store import CheckpointStore

logger = logging.getLogger(__name__)


class ResilientCheckpoint(MonitorCallback):  # type: ignore[misc]  # Keras is untyped
    """Saves Orbax checkpoints, and lets a run that was killed continue as if nothing happened.

    A drop-in superset of `keras.callbacks.OrbaxCheckpoint`: change the class name, and the
    script can be killed and started again at will. The restarted run continues from the
    newest good state, in the middle of an epoch if need be, and comes to the same weights
    and History, bit for bit, as a run that was never touched.

    Example:
    ```python
    model.fit(
        x, y, epochs=10, validation_data=(x_val, y_val),
        callbacks=[ResilientCheckpoint("checkpoints", save_freq=500, keep_best=3)],
    )
    ```

    Checkpoints are named by *step*: the number of train batches run since the start of the
    run, over all epochs, calls of `fit` and restarts. `keras.saving.load_model(directory)`
    and `model.load_weights(directory)` read the newest one (the best, with
    `save_best_only=True`) without this package.

    At a signal (SIGTERM by default) the newest state is committed and the process leaves by
    `Preempted`, a `SystemExit` with code 128 + signal. At Ctrl-C it is committed and
    `KeyboardInterrupt` is raised; a second Ctrl-C leaves at once.

    Several calls of `fit` in one script, with one instance or several, are the *phases* of
    one run. After a restart, the phases that had finished return at once with their History,
    and the one that was killed continues.

    Args:
        directory: The directory for the checkpoints of this run, local or on a shared file
            system. A URL, such as `"gs://bucket/run"`, is taken as the `mirror` of a directory
            in the user's cache.
        monitor: The metric that says what is best, such as `"val_loss"`.
        verbose: 0 or 1. With 1, the first line of a resumed run is printed as well as logged.
        save_best_only: If `True`, `directory` holds only checkpoints that were the best when
            they were saved. What is needed to resume is kept in `directory/resume`.
        mode: `"auto"`, `"min"` or `"max"`: which direction of `monitor` is better.
        save_freq: `"epoch"`, a number of batches, a `datetime.timedelta`, or a `SavePolicy`,
            such as `EveryBatches(1000) | EverySeconds(600)`.
        initial_value_threshold: Only a value better than this counts as best.
        max_to_keep: How many of the newest checkpoints to keep; `None` keeps all.
        save_on_background: Whether another process writes while training goes on.
        save_weights_only: If `True`, the checkpoints in `directory` hold the weights alone.
            What is needed to resume is kept in `directory/resume`.
        keep_best: How many of the best checkpoints, by `monitor` at the end of epochs, to
            keep besides the newest; each best epoch is saved, whatever `save_freq` says.
        resume: `"auto"` continues from the newest good state, if there is one. `"never"`
            refuses to write where another run has checkpoints. A step number goes back to
            that step; checkpoints after it are moved to `directory/quarantine`.
        signals: The signals that mean preemption.
        grace_seconds: Seconds from such a signal to the kill, if known.
        on_preemption: `"exit"` raises `Preempted`; `"stop"` lets `fit` return, without
            validation or end-of-epoch callbacks for the epoch begun.
        exit_code: The exit code of `Preempted`, instead of 128 + signal.
        durability: What a commit survives: `"power-loss"` waits until everything is on the
            disk; `"process"` leaves that to the operating system.
        retry: How storage errors that may pass are retried.
        max_failed_saves: After more failed saves in a row than this, training ends with
            `SaveFailedError`. By default it goes on, and only the last save must succeed.
        save_timeout_seconds: A save under way that has taken so long when the next one is
            due, as on a file system that hangs, counts as failed, and its writer is ended;
            `None` waits for ever.
        mirror: Where committed checkpoints are copied to while training goes on: any URL of
            fsspec, such as `"s3://bucket/run"`, or a `Mirror` with a retention of its own. A
            run that finds nothing newer in `directory` continues from there.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument has a wrong value.
    """

    # Nothing is overridden that would make Keras wait for every batch's logs.
    async_safe = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        mode: str = "auto",
        save_freq: Any = "epoch",
        initial_value_threshold: float | None = None,
        max_to_keep: int | None = 1,
        save_on_background: bool = True,
        save_weights_only: bool = False,
        *,
        keep_best: int = 0,
        resume: Literal["auto", "never"] | int = "auto",
        signals: Iterable[int] = (signal.SIGTERM,),
        grace_seconds: float | None = None,
        on_preemption: Literal["exit", "stop"] = "exit",
        exit_code: int | None = None,
        durability: Durability = "power-loss",
        retry: RetryPolicy | None = None,
        max_failed_saves: int | None = None,
        save_timeout_seconds: float | None = 1800.0,
        mirror: str | Mirror | None = None,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise ValueError(
                "ResilientCheckpoint works with Keras on JAX; the backend is "
                f"{keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
            raise TypeError(f"`directory` must be a non-empty path, got {directory!r}.")
        if not isinstance(monitor, str):
            raise TypeError(f"`monitor` must be the name of a metric, got {monitor!r}.")
        if initial_value_threshold is not None:
            _check_number("initial_value_threshold", initial_value_threshold)
        _check_count("keep_best", keep_best, least=0)
        if max_to_keep is not None:
            _check_count("max_to_keep", max_to_keep, least=1, also="or None, which keeps all")
        if max_failed_saves is not None:
            _check_count("max_failed_saves", max_failed_saves, least=0, also="or None")
        if save_best_only and keep_best:
            raise ValueError(
                f"`keep_best`={keep_best} keeps the best checkpoints besides the newest ones; with "
                "`save_best_only=True` there are no others. Use `max_to_keep`."
            )
        if on_preemption not in ("exit", "stop"):
            raise ValueError(f"`on_preemption` must be 'exit' or 'stop', got {on_preemption!r}.")
        if isinstance(resume, bool) or not (
            resume in ("auto", "never") or (isinstance(resume, int) and resume >= 0)
        ):
            raise ValueError(
                f"`resume` must be 'auto', 'never' or a step number >= 0, got {resume!r}."
            )
        if exit_code is not None and not (isinstance(exit_code, int) and 0 <= exit_code <= 255):
            raise ValueError(f"`exit_code` must be from 0 to 255, or None, got {exit_code!r}.")
        if durability not in DURABILITIES:
            raise ValueError(f"`durability` must be one of {DURABILITIES}, got {durability!r}.")
        _check_seconds("grace_seconds", grace_seconds)
        _check_seconds("save_timeout_seconds", save_timeout_seconds)
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise TypeError(f"`retry` must be a RetryPolicy, got {retry!r}.")
        if mirror is not None and not isinstance(mirror, str | Mirror):
            raise TypeError(f"`mirror` must be a URL, a Mirror or None, got {mirror!r}.")
        for name, value in (
            ("save_best_only", save_best_only),
            ("save_on_background", save_on_background),
            ("save_weights_only", save_weights_only),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")
        super().__init__(monitor, mode, initial_value_threshold)
        self.directory = os.fspath(directory)
        if "://" in self.directory:
            if mirror is not None:
                raise ValueError(
                    f"`directory`={self.directory!r} is a URL, which is mirrored to itself; there "
                    f"cannot be another `mirror`, got {mirror!r}."
                )
            mirror, self.directory = self.directory, str(staging_directory(self.directory))
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_freq = save_freq
        self.max_to_keep = max_to_keep
        self.save_on_background = save_on_background
        self.save_weights_only = save_weights_only
        self.keep_best = keep_best
        self._policy: SavePolicy = policy_from(save_freq)
        # Made here once, so that a bad URL is an error now.
        self._mirror = Mirror(mirror, retry=retry) if isinstance(mirror, str) else mirror
        self._mirror_like_store = isinstance(mirror, str)
        self._retry = retry
        self._durability: Durability = durability
        self._options = EngineOptions(
            save_best_only=save_best_only,
            save_weights_only=save_weights_only,
            keep_best=keep_best,
            background=save_on_background,
            signals=_check_signals(signals),
            grace_seconds=grace_seconds,
            on_preemption=on_preemption,
            exit_code=exit_code,
            resume=resume,
            max_failed_saves=max_failed_saves,
            save_timeout_seconds=save_timeout_seconds,
        )
        self._session: FitSession | None = None
        self._engine: Engine | None = None
        self._warned = False

    @property
    def failed_saves(self) -> int:
        """How many saves have failed in the running, or last, `fit`."""
        return self._engine.failed_saves if self._engine is not None else 0

    @property
    def failed_uploads(self) -> int:
        """How many uploads to the mirror have failed in the running, or last, `fit`."""
        return self._engine.failed_uploads if self._engine is not None else 0

    @property
    def latest_step(self) -> int | None:
        """The step of the newest committed checkpoint, or `None`."""
        store = CheckpointStore(self.directory)
        steps = [c.step for c in store.checkpoints() if c.root is Root.PUBLIC or c.resumable]
        return max(steps, default=None)

    def wait_until_finished(self) -> None:
        """Waits until the save under way, if any, has ended."""
        if self._engine is not None:
            self._engine.wait()

    # Keras' events.

    def set_model(self, model: Any) -> None:
        """Takes its places in the list of callbacks: the last, and by proxy the first."""
        super().set_model(model)
        callback_list = find_callback_list(self)
        if callback_list is not None:
            others = [
                callback
                for callback in callback_list.callbacks
                if callback is not self and not (isinstance(callback, _First) and callback.of(self))
            ]
            # A new list: Keras is iterating over the old one.
            callback_list.callbacks = [_First(self), *others, self]

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Resumes, if there is something to continue."""
        if self._session is None:
            raise RuntimeError(
                "ResilientCheckpoint works within model.fit(callbacks=[...]); in a training loop "
                "of your own use resilient_ckpt.CheckpointStore."
            )
        try:
            self._session.begin()
        except BaseException:
            self._session.close()
            self._session = None
            raise

    def _prepare(self) -> None:
        if jax.process_count() > 1:
            raise NotImplementedError(
                f"This version saves single-process runs only; jax runs {jax.process_count()} "
                "processes."
            )
        callback_list = find_callback_list(self)
        fit = find_fit(callback_list)
        if fit is None:
            return
        if self.monitor_op is None and (self.save_best_only or self.keep_best):
            self._set_monitor_op()
        larger_is_better = self.monitor_op is not None and bool(self.monitor_op(2.0, 1.0))
        options = dataclasses.replace(self._options, mode="max" if larger_is_better else "min")
        retention = RetentionPolicy(self.max_to_keep, self.keep_best, options.mode)
        store = CheckpointStore(self.directory, retention, self._durability, self._retry)
        if self._mirror is not None and self._mirror_like_store:
            self._mirror.retention = retention
        self._engine = Engine(store, self._policy, options, self._mirror)
        others = [c for c in callback_list.callbacks if not isinstance(c, _First) and c is not self]
        session = FitSession(
            self._engine,
            self.model,
            fit,
            others,
            self.params["epochs"],
            self._measure,
            (lambda: self.best, lambda value: setattr(self, "best", value)),
            self._announce,
        )
        session.prepare()
        self._session = session

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Completes the restoring of a run that continues within an epoch."""
        if self._session is not None:
            self._session.epoch_begin(epoch)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Sees to it that a notice is heard during a validation, too."""
        if self._session is not None:
            self._session.test_begin()

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """The validation is over."""
        if self._session is not None:
            self._session.test_end()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves, if it is time."""
        if self._session is not None:
            self._session.epoch_end(epoch, logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Finishes the save under way and puts everything back."""
        session, self._session = self._session, None
        if session is not None:
            session.train_end(self.model.history)

    # What is best.

    def _measure(self, logs: Mapping[str, Any] | None) -> Measurement:
        if not (self.save_best_only or self.keep_best):
            return Measurement()
        value = (logs or {}).get(self.monitor)
        if value is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"What is best is judged by `{self.monitor}`, which is not available; there "
                    f"are: {', '.join(logs or {})}. No checkpoint is saved as best.",
                    stacklevel=2,
                )
            return Measurement()
        value = float(value)
        if math.isnan(value):
            return Measurement(value)
        return Measurement(value, bool(self._is_improvement(value, self.best)))

    def _announce(self, line: str) -> None:
        logger.info(line)
        if self.verbose:
            print(line, flush=True)


class _First(keras.callbacks.Callback):  # type: ignore[misc]  # Keras is untyped
    """Stands at the beginning of the list for a `ResilientCheckpoint` at its end."""

    async_safe = True

    def __init__(self, callback: ResilientCheckpoint) -> None:
        super().__init__()
        self._callback = callback

    def of(self, callback: ResilientCheckpoint) -> bool:
        return self._callback is callback

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._callback._prepare()

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._callback._session is not None:
            self._callback._session.batch_begin()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._callback._session is not None:
            self._callback._session.epoch_ending()


def _check_count(name: str, value: object, least: int, also: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"`{name}` must be an integer >= {least}{f' {also}' if also else ''}, got {value!r}."
        )


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number or None, got {value!r}.")


def _check_seconds(name: str, value: object) -> None:
    if value is None:
        return
    _check_number(name, value)
    if not (isinstance(value, int | float) and value > 0):
        raise ValueError(f"`{name}` must be a positive number of seconds, got {value!r}.")


def _check_signals(signals: object) -> tuple[int, ...]:
    if not isinstance(signals, Iterable) or isinstance(signals, str):
        raise TypeError(f"`signals` must be a collection of signals, got {signals!r}.")
    checked = []
    for number in signals:
        try:
            valid = signal.Signals(number)
        except ValueError:
            raise ValueError(f"`signals` holds {number!r}, which is not a signal.") from None
        if valid in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(f"`signals` holds {valid.name}, which no process can handle.")
        checked.append(int(valid))
    return tuple(checked)
