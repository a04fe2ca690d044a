"""One call of `fit`: what the engine knows nothing of, since it is Keras'.

The moments between two batches are those *before* the callbacks hear that a batch begins:
there every callback has dealt with the batch before, and the trainer holds the state as it
will be handed to the next step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from keras.src.saving import saving_lib

from resilient_ckpt import callback_states
from resilient_ckpt.engine import Captured, Engine, MainThreadWait, Measurement
from resilient_ckpt.errors import CheckpointMismatchError
from resilient_ckpt.fit_call import FitCall
from resilient_ckpt.patches import Patches
from resilient_ckpt.policy import Progress
from resilient_ckpt.position import DataPosition, ValidationDraws
from resilient_ckpt.resume import ResumePoint
from resilient_ckpt.state import WEIGHTS, TrainState

logger = logging.getLogger(__name__)

_CHECKPOINTABLE_CALLBACKS = "callbacks"


class FitSession:
    """Saves and resumes one call of `fit`.

    Args:
        engine: Decides and saves.
        model: The model.
        fit: The running `fit`.
        callbacks: The other callbacks.
        epochs: The number of epochs that `fit` was called for.
        measure: Given the logs, says what the monitored value is worth.
        best: Gets and sets the best value so far.
        announce: Takes the line that says what was restored.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        fit: FitCall,
        callbacks: Sequence[Any],
        epochs: int,
        measure: Callable[[Mapping[str, Any] | None], Measurement],
        best: tuple[Callable[[], Any], Callable[[Any], None]],
        announce: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._model = model
        self._fit = fit
        self._callbacks = tuple(callbacks)
        self._epochs = epochs
        self._measure = measure
        self._get_best, self._set_best = best
        self._announce = announce
        self._patches = Patches()
        self._data = DataPosition(fit.epoch_iterator, self._patches)
        self._draws = ValidationDraws()
        self._state = TrainState(model)
        self._extras = self._describe_model()
        self._step = 0
        self._epoch = 0
        self._batch = 0
        self._epoch_over = False  # all batches of the epoch are run
        self._in_epoch = False  # batches of the epoch are still to come
        self._ran = False  # a batch was run by this process
        self._replayed = False
        self._replay_patches = Patches()  # one more round of the loop, to come to its end
        self._test_patches = Patches()
        self._leaving = False  # `fit` is on its way out after a notice
        self._logs: Any = {}
        self._waiting: Callable[[], Captured] | None = None
        self._before_validation: list[np.ndarray] | None = None
        self._before_epoch_end: tuple[list[dict[str, Any]], list[np.ndarray]] | None = None
        self._point: ResumePoint | None = None
        self._resume_in_epoch = False
        self._outer_exception = sys.exc_info()[1]

    # The beginning.

    def prepare(self) -> None:
        """Finds the checkpoint; called before any other callback hears of the beginning."""
        self._point = self._engine.open(["pytree", _CHECKPOINTABLE_CALLBACKS])
        if self._point is not None:
            callback_states.prepare(self._callbacks)

    def begin(self) -> None:
        """Restores; called after every other callback has heard of the beginning.

        Raises:
            CheckpointMismatchError: If the checkpoint is of another model.
        """
        engine = self._engine
        run = engine.run
        point = self._point
        self._patches.set(self._model, "_initial_epoch", None)
        if point is None:
            self._step = run.step
        else:
            record = point.checkpoint.record
            phase = record.get("phase", 0)
            if not record:
                self._resume_foreign(point)
            elif phase > run.phase:
                self._skip_phase(point)
            elif phase == run.phase:
                self._resume(point)
            else:
                self._step = run.step
        self._inner_train = self._model.train_function
        self._patches.set(self._model, "train_function", self._train)
        self._patches.set(self._model, "jax_state_sync", self._sync)
        engine.rescue = self._rescue
        engine.begin(self._progress(), self._state.values())

    def _resume(self, point: ResumePoint) -> None:
        record = point.checkpoint.record
        self._restore(warn=True)
        self._engine.policy.set_state(record.get("policy", {}))
        self._set_best(record.get("best"))
        self._engine.run.histories[:] = record.get("phases", [])
        self._step = point.checkpoint.step
        self._epoch, self._batch = record["epoch"], record["batch"]
        self._draws.resume(record.get("validation_draws", []))
        finished = bool(record.get("finished")) and self._epochs <= record.get("epochs", 0)
        self._model._initial_epoch = self._epochs if finished else self._epoch
        batches = self._fit.epoch_iterator.num_batches or record["data"].get("num_batches")
        self._epoch_over = record["epoch_over"] or (batches is not None and self._batch >= batches)
        self._resume_in_epoch = self._batch > 0
        self._data.resume(record.get("data", {}), self._batch, self._epoch_over)
        self._logs = record.get("logs", {})
        age = max(0.0, self._engine.wall_now() - record.get("saved_at", 0.0))
        self._announce(
            f"Resumed from step {self._step} (epoch {self._epoch + 1}, batch {self._batch}), "
            f"saved {age:.0f} s ago: {_why(record)}."
            + (" The run had finished." if finished else "")
        )

    def _resume_foreign(self, point: ResumePoint) -> None:
        """Continues a run of plain OrbaxCheckpoint, whose position can only be computed."""
        self._state.restore(point.trees["pytree"], str(point.checkpoint.path))
        iterations = int(self._model.optimizer.iterations)
        self._step = self._engine.run.step = max(point.checkpoint.step, iterations)
        batches = self._fit.epoch_iterator.num_batches
        if batches:
            self._epoch = iterations // batches
        self._model._initial_epoch = self._epoch
        self._announce(f"Resumed from {point.checkpoint.path}, in epoch {self._epoch + 1}.")
        logger.warning(
            "%s was not written by this package: it carries no position, random states, History "
            "or callbacks' states, so those begin anew.",
            point.checkpoint.path,
        )

    def _skip_phase(self, point: ResumePoint) -> None:
        """Does nothing in a `fit` that the killed process had completed."""
        record = point.checkpoint.record
        run = self._engine.run
        phases = record.get("phases", [])
        try:
            self._state.restore(point.trees["pytree"], str(point.checkpoint.path), WEIGHTS)
        except CheckpointMismatchError:
            logger.warning(
                "Phase %d of this run is finished and is not run again; its weights are not "
                "those of the newest checkpoint, and are left as they are.",
                run.phase + 1,
            )
        if run.phase < len(phases):
            callback_states.restore(self._callbacks, [phases[run.phase]], [], warn=False)
        self._model._initial_epoch = self._epochs
        self._step = point.checkpoint.step
        self._announce(f"This fit (phase {run.phase + 1} of the run) had finished.")

    def _restore(self, warn: bool) -> None:
        assert self._point is not None
        trees = self._point.trees
        self._state.restore(trees["pytree"], str(self._point.checkpoint.path))
        saved = trees.get(_CHECKPOINTABLE_CALLBACKS) or {}
        arrays = [saved[str(index)] for index in range(len(saved))]
        states = self._point.checkpoint.record.get("callbacks", [])
        callback_states.restore(self._callbacks, states, arrays, warn)

    # During training.

    def epoch_begin(self, epoch: int) -> None:
        """To be called when every other callback has heard that an epoch begins."""
        if self._resume_in_epoch:
            # They, and the reset of the metrics, have changed what was restored.
            self._resume_in_epoch = False
            self._restore(warn=False)
        else:
            self._batch = 0
            self._epoch_over = False
        self._point = None
        self._epoch = epoch
        self._in_epoch = not self._epoch_over
        if self._epoch_over:
            self._begin_replay()

    def _begin_replay(self) -> None:
        """Has `fit` go once around its loop, unheard, to come to the end of the epoch."""
        self._epoch_over, self._in_epoch = True, False
        for event in ("on_train_batch_begin", "on_train_batch_end"):
            self._replay_patches.set(self._fit.callback_list, event, _ignore)

    def batch_begin(self) -> None:
        """To be called before any other callback hears that a batch begins.

        Raises:
            SystemExit: After a notice.
        """
        if self._leaving:
            return
        engine = self._engine
        if self._noticed():
            self._save_and_leave(self._capture)
            return
        progress = self._progress()
        if not engine.due(progress):
            return
        # What is best is judged at the end of epochs, but for save_best_only.
        best_only = engine.options.save_best_only
        measurement = self._measure(self._logs) if best_only else Measurement()
        self._save(progress, measurement, "interval", due=True)

    def _train(self, state: Any, iterator: Any) -> Any:
        if self._leaving:
            return self._logs, state
        if self._epoch_over:
            if self._replayed:
                raise StopIteration
            self._replayed = True
            return self._logs, state
        try:
            batches = self._take(
                iterator, lambda: self._capture(state, batch_begun=True), self._data.begin_draw
            )
        except StopIteration:
            if self._ran or self._batch == 0:
                raise
            # Killed after the last batch of data whose length Keras did not know: it would
            # miss the logs of this batch.
            self._begin_replay()
            self._replayed = True
            return self._logs, state
        if batches is None:
            return self._logs, state
        self._ran = True
        self._logs, state = self._inner_train(state, iter(batches))
        self._data.end_draw(batches)
        self._batch += len(batches)
        self._step += len(batches)
        return self._logs, state

    def _take(
        self,
        iterator: Any,
        capture: Callable[[], Captured],
        begin: Callable[[Any], None] = lambda iterator: None,
    ) -> list[Any] | None:
        """Waits for the next batches, and hears a notice while it waits.

        Returns:
            The batches, or `None` if `fit` is to be left.

        Raises:
            StopIteration: If there is no batch left.
            SystemExit: After a notice.
        """
        engine = self._engine
        if self._noticed():
            self._save_and_leave(capture)
            return None
        begin(iterator)
        batches = None
        self._waiting = capture
        try:
            engine.waiting_for_data = True
            batches = _draw(iterator, self._data.steps_per_execution)
            engine.waiting_for_data = False
        except MainThreadWait:
            engine.expect_notice()
        finally:
            engine.waiting_for_data = False
        if self._noticed():
            self._save_and_leave(capture)
            return None
        return batches

    def _noticed(self) -> bool:
        return self._engine.notice is not None

    def _rescue(self) -> tuple[Callable[[], Captured], Progress] | None:
        waiting = self._waiting
        return None if waiting is None else (waiting, self._progress())

    # Validation.

    def test_begin(self) -> None:
        """To be called when a validation begins within the `fit`."""
        self._end_of_batches()
        names = ("non_trainable_variables", "metrics_variables")
        # A validation gives the memory of these away, and resets the metrics.
        self._before_validation = [
            np.array(variable.value) for name in names for variable in self._state.variables[name]
        ]
        self._before_epoch_end = callback_states.capture(self._callbacks)
        self._draws.begin(getattr(self._model, "_eval_epoch_iterator", None))
        inner = self._model.test_function

        def test(state: Any, iterator: Any) -> Any:
            if self._leaving:
                return {}, state
            batches = self._take(iterator, lambda: self._capture_validation(state[0]))
            if batches is None:
                self._model.stop_evaluating = True
                return {}, state
            self._draws.drawn(len(batches))
            return inner(state, iter(batches))

        self._test_patches.set(self._model, "test_function", test)

    def test_end(self) -> None:
        """To be called when the validation has ended."""
        self._test_patches.undo()
        if not self._leaving:
            self._draws.end()

    # The end of an epoch.

    def epoch_ending(self) -> None:
        """To be called before any other callback hears that an epoch ends."""
        self._end_of_batches()
        self._before_epoch_end = callback_states.capture(self._callbacks)

    def _end_of_batches(self) -> None:
        self._epoch_over, self._in_epoch = True, False
        self._replay_patches.undo()

    def epoch_end(self, epoch: int, logs: Mapping[str, Any] | None) -> None:
        """To be called when every other callback has heard that an epoch ends.

        Raises:
            SystemExit: After a notice.
        """
        engine = self._engine
        last = bool(self._model.stop_training) or epoch + 1 >= self._epochs
        self._epoch, self._batch = epoch + 1, 0
        self._epoch_over = self._in_epoch = False
        self._before_validation = self._before_epoch_end = None
        progress = self._progress(epoch_end=True)
        due = engine.due(progress)
        measurement = self._measure(logs)
        if engine.options.save_best_only and not due:
            measurement = Measurement()
        best = engine.would_be_best(measurement.value)
        if due or last or best:
            reason = "end" if last else "interval" if due else "best"
            self._save(progress, measurement, reason, due, finished=last)
        if self._noticed():
            self._save_and_leave(lambda: self._capture(finished=last))

    def _save(
        self,
        progress: Progress,
        measurement: Measurement,
        reason: str,
        due: bool,
        finished: bool = False,
    ) -> None:
        if measurement.improved:
            self._set_best(measurement.value)
        self._engine.save_interval(
            progress, lambda: self._capture(finished=finished), measurement, reason, due
        )

    def train_end(self, history: Any) -> None:
        """To be called when `fit` returns.

        Args:
            history: Keras' History callback.

        Raises:
            SaveFailedError: If the newest state could not be saved.
        """
        self._patches.undo()
        if self._leaving:
            return
        states, _ = callback_states.capture([history])
        self._engine.finish(states[0])

    # Leaving.

    def _save_and_leave(self, capture: Callable[[], Captured]) -> None:
        engine = self._engine
        try:
            engine.save_emergency(capture, self._progress())
            engine.mirror_in_time()
            error = engine.leave()
        except BaseException:
            self.close()
            raise
        if error is not None:
            self.close()
            raise error
        engine.close()
        self._leaving = True
        self._model.stop_training = True
        # Nothing that belongs to the end of an epoch may happen on half of one.
        self._patches.set(self._model, "_should_eval", lambda *args, **kwargs: False)
        for event in ("on_train_batch_end", "on_test_batch_end", "on_epoch_end"):
            self._patches.set(self._fit.callback_list, event, _ignore)

    def _sync(self) -> None:
        # `fit` calls this in its `finally`, which is the only sign of an exception there is.
        type(self._model).jax_state_sync(self._model)
        error = sys.exc_info()[1]
        if error is None or error is self._outer_exception:
            return
        if sys._getframe(1).f_code is self._fit.code:
            self._abort(error)

    def _abort(self, error: BaseException) -> None:
        """Saves the newest state when an exception goes out of `fit`."""
        engine = self._engine
        reason = "interrupt" if isinstance(error, KeyboardInterrupt) else "exception"
        try:
            engine.save_emergency(self._capture, self._progress(), reason)
            if reason != "interrupt":
                engine.mirror_in_time()
        except Exception:
            # The exception on its way out matters more than this one.
            logger.exception("The state at the exception could not be saved.")
        finally:
            self.close()

    def close(self) -> None:
        """Puts everything back and finishes the save under way."""
        self._test_patches.undo()
        self._replay_patches.undo()
        self._patches.undo()
        self._engine.close()

    # Capturing.

    def _progress(self, epoch_end: bool = False) -> Progress:
        return Progress(self._step, self._epoch, self._batch, self._engine.clock(), epoch_end)

    def _leaves(self) -> list[Any]:
        held = getattr(self._model, "_jax_state", None)
        if held and not self._model._jax_state_synced:
            return [array for group in self._state.variables for array in held.get(group) or ()]
        return self._state.values()

    def _capture(
        self, state: Any = None, batch_begun: bool = False, finished: bool = False
    ) -> Captured:
        if self._epoch_over:
            return self._capture_validation(None)
        leaves = self._leaves() if state is None else [array for group in state for array in group]
        states = callback_states.capture(self._callbacks, batch_begun)
        return self._captured(leaves, states, finished)

    def _capture_validation(self, trainable: Sequence[Any] | None) -> Captured:
        """The state at the end of the epoch's batches, before its validation."""
        variables = self._state.variables
        # During the validation the trainer has taken their values away from all variables
        # but the optimizer's.
        values: dict[str, Sequence[Any]] = {}
        if trainable is not None:
            values["trainable_variables"] = trainable
        if self._before_validation is not None:
            count = len(variables["non_trainable_variables"])
            values["non_trainable_variables"] = self._before_validation[:count]
            values["metrics_variables"] = self._before_validation[count:]
        leaves: list[Any] = []
        for name, group in variables.items():
            leaves.extend(values[name] if name in values else [v.value for v in group])
        states = self._before_epoch_end or callback_states.capture(self._callbacks)
        return self._captured(leaves, states, finished=False)

    def _captured(
        self,
        leaves: list[Any],
        states: tuple[list[dict[str, Any]], list[np.ndarray]],
        finished: bool,
    ) -> Captured:
        entries, arrays = states
        trees: dict[str, Any] = {"pytree": self._state.tree}
        if arrays:
            trees[_CHECKPOINTABLE_CALLBACKS] = {
                str(index): len(leaves) + index for index in range(len(arrays))
            }
        record = {
            "callbacks": entries,
            "data": self._data.capture(self._batch, self._in_epoch),
            "validation_draws": self._draws.finished,
            "best": _plain(self._get_best()),
            "epochs": self._epochs,
            "finished": finished,
            "epoch_over": self._epoch_over,
            "logs": _plain_logs(self._logs),
        }
        return Captured(
            leaves=[*leaves, *arrays],
            trees=trees,
            weights_tree=self._state.weights_tree,
            weights=self._state.trainable_indices,
            extras=self._extras,
            record=record,
            transient=self._epoch_over,
        )

    def _describe_model(self) -> dict[str, Any]:
        config, _ = saving_lib._serialize_model_as_json(self._model)
        extras: dict[str, Any] = {"model_config": {"config": config}}
        assets = saving_lib._save_assets_to_dict(self._model)
        if assets is not None:
            extras["assets"] = assets
        return extras


def _draw(iterator: Any, count: int) -> list[Any]:
    """Draws up to `count` batches.

    Raises:
        StopIteration: If there is none left.
    """
    batches = [next(iterator)]
    for _ in range(count - 1):
        batch = next(iterator, _END)
        if batch is _END:
            break
        batches.append(batch)
    return batches


_END = object()


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _why(record: Mapping[str, Any]) -> str:
    source = record.get("source")
    return f"{record.get('reason', 'unknown')}{f' ({source})' if source else ''}"


def _plain(value: Any) -> float | None:
    return None if value is None else float(value)


def _plain_logs(logs: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (logs or {}).items() if np.ndim(value) == 0}
