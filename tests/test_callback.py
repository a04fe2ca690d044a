"""The callback's contract: arguments, resume modes, phases, failures, what is put back."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import signal
import threading
import time

import keras
import numpy as np
import pytest
from exact import numbers, restart, small_model

from resilient_ckpt import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointsExistError,
    CheckpointStore,
    ResilientCheckpoint,
    RetryPolicy,
    SaveFailedError,
    store,
)
from resilient_ckpt.record import Root


def steps(directory, root=Root.PUBLIC):
    return [c.step for c in CheckpointStore(directory).checkpoints() if c.root is root]


def fit(directory, model=None, epochs=2, callbacks=(), **options):
    if model is None:
        restart()
        keras.utils.set_random_seed(5)
        model = small_model()
    x, y = numbers()
    options = {"save_on_background": False, "durability": "process", **options}
    checkpoint = ResilientCheckpoint(directory, **options)
    history = model.fit(
        x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[*callbacks, checkpoint]
    )
    return model, history, checkpoint


class At(keras.callbacks.Callback):
    """Does something after a batch."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action, self.seen = step, action, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            self.action(self)


def fail(callback):
    raise RuntimeError("made to fail")


def test_latest_step(tmp_path):
    assert ResilientCheckpoint(tmp_path).latest_step is None
    _, _, checkpoint = fit(tmp_path, save_freq=3, max_to_keep=None)
    assert steps(tmp_path) == [3, 6, 9, 10]
    assert checkpoint.latest_step == ResilientCheckpoint(tmp_path).latest_step == 10


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"directory": ""}, TypeError, "`directory`.*''"),
        ({"directory": 3}, TypeError, "`directory`.*3"),
        ({"monitor": None}, TypeError, "`monitor`.*None"),
        ({"save_freq": "batch"}, ValueError, "`save_freq`: 'batch'.*'epoch'"),
        ({"save_freq": 0}, ValueError, "`save_freq`: 0"),
        ({"save_freq": True}, ValueError, "`save_freq`: True"),
        ({"save_freq": datetime.timedelta(0)}, ValueError, "`save_freq`"),
        ({"max_to_keep": 0}, ValueError, "`max_to_keep`.*>= 1.*got 0"),
        ({"keep_best": -1}, ValueError, "`keep_best`.*>= 0.*got -1"),
        ({"keep_best": 1, "save_best_only": True}, ValueError, "`keep_best`=1"),
        ({"initial_value_threshold": "1"}, TypeError, "`initial_value_threshold`.*'1'"),
        ({"resume": "always"}, ValueError, "`resume`.*'auto', 'never'.*'always'"),
        ({"resume": -1}, ValueError, "`resume`.*-1"),
        ({"signals": [signal.SIGKILL]}, ValueError, "`signals`.*SIGKILL"),
        ({"signals": [999]}, ValueError, "`signals`.*999"),
        ({"signals": "SIGTERM"}, TypeError, "`signals`.*'SIGTERM'"),
        ({"grace_seconds": 0}, ValueError, "`grace_seconds`.*0"),
        ({"on_preemption": "continue"}, ValueError, "`on_preemption`.*'continue'"),
        ({"exit_code": 300}, ValueError, "`exit_code`.*300"),
        ({"max_failed_saves": -1}, ValueError, "`max_failed_saves`.*-1"),
        ({"save_best_only": 1}, TypeError, "`save_best_only`.*1"),
        ({"retry": 3}, TypeError, "`retry`.*3"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        ResilientCheckpoint(**{"directory": tmp_path, **options})
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written_says_so_before_the_first_batch(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    ran = At(1, lambda callback: None)
    with pytest.raises(OSError, match="`directory` cannot be written"):
        fit(blocked / "checkpoints", callbacks=[ran])
    assert ran.seen == 0


def test_resume_never_refuses_another_run(tmp_path):
    fit(tmp_path)
    with pytest.raises(CheckpointsExistError, match=r'resume="never".*\[5, 10\]'):
        fit(tmp_path, resume="never")
    fit(tmp_path / "new", resume="never")


def test_resume_at_a_step_sets_the_later_ones_aside(tmp_path):
    whole, history, _ = fit(tmp_path, epochs=3, save_freq=2, max_to_keep=None)
    again, history_again, _ = fit(tmp_path, epochs=3, save_freq=2, max_to_keep=None, resume=8)
    assert history_again.history == history.history
    for a, b in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps(tmp_path) == [2, 4, 6, 8, 10, 12, 14, 15]
    why = {path.read_text() for path in (tmp_path / "quarantine").glob("*/why.txt")}
    assert why == {"The run was taken back to step 8.\n"}
    # The job is restarted with the same argument: it goes on, and not back.
    ran = At(1, lambda callback: None)
    fit(tmp_path, epochs=4, save_freq=2, max_to_keep=None, resume=8, callbacks=[ran])
    assert ran.seen == 5


def test_resume_at_a_step_that_is_not_there(tmp_path):
    fit(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"resume=7.*there are \[5, 10\]"):
        fit(tmp_path, resume=7)
    assert steps(tmp_path) == [10]


def test_resume_is_announced(tmp_path, capsys, caplog):
    with pytest.raises(RuntimeError):
        fit(tmp_path, callbacks=[At(8, fail)], save_freq=100)
    with caplog.at_level(logging.INFO, "resilient_ckpt"):
        fit(tmp_path, verbose=1)
    said = "Resumed from step 8 (epoch 2, batch 3), saved"
    assert said in capsys.readouterr().out
    assert any(said in r.message and "exception" in r.message for r in caplog.records)


@pytest.mark.parametrize("how", ["shape", "layers", "optimizer", "dtype"])
def test_another_model_is_refused_and_changes_nothing(tmp_path, how):
    fit(tmp_path, epochs=1)
    restart()
    inputs = keras.Input((8,), name="inputs")
    x = keras.layers.Dense(9 if how == "shape" else 8, activation="relu", name="hidden")(inputs)
    if how != "layers":
        x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.3, name="drop")(x)
    last = keras.layers.Dense(1, name="out", dtype="bfloat16" if how == "dtype" else None)
    model = keras.Model(inputs, last(x), name="model")
    model.compile("sgd" if how == "optimizer" else "adam", "mse", metrics=["mae"])
    before = model.get_weights()
    with pytest.raises(CheckpointMismatchError) as caught:
        fit(tmp_path, model, epochs=2)
    error = caught.value
    found = {
        "shape": "trainable_variables/hidden/kernel: checkpoint (8, 8) float32, model (8, 9)",
        "layers": "trainable_variables/norm/gamma",
        "optimizer": "optimizer_variables/adam/iteration",
        "dtype": "out/kernel: checkpoint (8, 1) float32, model (8, 1) bfloat16",
    }[how]
    assert found in str(error)
    assert error.missing or error.extra or error.different
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert steps(tmp_path) == [5]
    fit(tmp_path, epochs=2)  # The lock was given back, the checkpoint is whole.


def phases(directory, kill=None):
    """Pre-training and fine-tuning in one script, with one instance."""
    restart()
    keras.utils.set_random_seed(5)
    model = small_model()
    x, y = numbers()
    killer = [At(kill, fail)] if kill else []
    checkpoint = ResilientCheckpoint(directory, save_freq=1, save_on_background=False)
    fit = {"batch_size": 4, "epochs": 2, "verbose": 0, "callbacks": [*killer, checkpoint]}
    first = model.fit(x, y, **fit)
    model.get_layer("hidden").trainable = False
    model.compile("sgd", "mae", metrics=["mse"])
    second = model.fit(x, y, **fit)
    return model, first.history, second.history


@pytest.mark.parametrize("kill", [3, 10, 11, 14])
def test_two_phases_on_one_directory(tmp_path, kill):
    whole, *histories = phases(tmp_path / "whole")
    assert steps(tmp_path / "whole") == [20]
    with pytest.raises(RuntimeError, match="made to fail"):
        phases(tmp_path / "cut", kill)
    resumed, *resumed_histories = phases(tmp_path / "cut")
    assert resumed_histories == histories
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_everything_is_put_back(tmp_path):
    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    interrupt = signal.getsignal(signal.SIGINT)
    wakeup = signal.set_wakeup_fd(-1)
    threads = set(threading.enumerate())
    try:
        for callbacks in ([], [At(3, fail)], [At(7, fail)]):
            restart()
            model = small_model()
            own = set(vars(model))
            try:
                fit(tmp_path / str(len(callbacks)), model, callbacks=callbacks)
            except RuntimeError:
                assert callbacks
            assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGINT) is interrupt
            assert signal.set_wakeup_fd(-1) == -1
            ours = {t.name for t in set(threading.enumerate()) - threads}
            assert not [name for name in ours if name.startswith("resilient-ckpt")]
            assert "jax_state_sync" not in set(vars(model)) - own
            assert model._initial_epoch is None
            model.evaluate(*numbers(), verbose=0)
            model.fit(*numbers(), verbose=0)  # without the callback
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(wakeup)


def test_no_process_is_left_behind(tmp_path):
    import psutil

    fit(tmp_path, save_on_background=True, save_freq=3)
    assert [p for p in psutil.Process().children() if "writer_process" in str(p.cmdline())] == []


def test_the_previous_handler_is_called_and_its_exception_comes_after_the_commit(tmp_path):
    def handler(number, frame):
        raise LookupError("the user's own way to leave")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        term = At(4, lambda callback: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(LookupError):
            fit(tmp_path, callbacks=[term], save_freq=100)
    finally:
        signal.signal(signal.SIGTERM, before)
    # A thread delivers the notice: the batch that follows may have begun.
    assert steps(tmp_path) in ([4], [5])


def test_a_user_s_training_loop_is_told_what_to_use(tmp_path):
    checkpoint = ResilientCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="CheckpointStore"):
        checkpoint.on_train_begin()


def test_evaluate_and_predict_with_the_callback_do_nothing(tmp_path):
    model, _, checkpoint = fit(tmp_path)
    model.evaluate(*numbers(), verbose=0, callbacks=[checkpoint])
    model.predict(numbers()[0], verbose=0, callbacks=[checkpoint])
    assert steps(tmp_path) == [10]


def test_nan_is_not_resumed_from(tmp_path):
    def spoil(callback):
        kernel = callback.model.get_layer("hidden").kernel
        kernel.assign(kernel.value * float("nan"))

    callbacks = [At(7, spoil), keras.callbacks.TerminateOnNaN()]
    fit(tmp_path, callbacks=callbacks, save_freq=1)
    store = CheckpointStore(tmp_path)
    finite = {c.step: c.finite for c in store.checkpoints()}
    assert finite == {5: True, 6: True, max(finite): False}
    restart()
    model, history, _ = fit(tmp_path, save_freq=1)
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()
    assert history.epoch == [0, 1]
    assert [p.name.split("-")[0] for p in (tmp_path / "quarantine").iterdir()] == ["8"]


def test_a_checkpoint_that_does_not_restore_is_set_aside(tmp_path, caplog):
    whole, history, _ = fit(tmp_path / "whole", epochs=3)
    fit(tmp_path / "cut", epochs=2, save_freq=3, max_to_keep=3)
    assert steps(tmp_path / "cut") == [6, 9, 10]
    for name in ("_METADATA", "manifest.ocdbt"):
        (tmp_path / "cut" / "10" / "pytree" / name).write_bytes(b"garbage")
    (tmp_path / "cut" / "9" / "resilient.json").write_text("{")
    resumed, resumed_history, _ = fit(tmp_path / "cut", epochs=3)
    assert resumed_history.history == history.history
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    aside = sorted(p.name.split("-")[0] for p in (tmp_path / "cut" / "quarantine").iterdir())
    assert aside == ["10", "9"]
    assert any("10 is damaged. pytree/_METADATA: " in r.message for r in caplog.records)
    assert any("9 is damaged. resilient.json: " in r.message for r in caplog.records)


def test_nothing_restores(tmp_path):
    fit(tmp_path)
    for path in tmp_path.rglob("resilient.json"):
        path.write_text("{")
    with pytest.raises(CheckpointNotFoundError, match="None of the 2 checkpoints") as caught:
        fit(tmp_path)
    for name in ("10", "resume/5"):
        assert f"{tmp_path / name} is damaged. resilient.json" in str(caught.value)
    assert steps(tmp_path) == [10]
    assert not (tmp_path / "quarantine").exists()


class FailingStore(CheckpointStore):
    """Fails as a real disk does, for the saves of some steps."""

    failing: tuple[int, ...] = ()
    tried: tuple[int, ...] = ()

    def save(self, job, arrays, time_left):
        step = job.targets[0].step
        type(self).tried += (step,)
        if step in self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().save(job, arrays, time_left)


@pytest.fixture
def failing_store(monkeypatch):
    monkeypatch.setattr("resilient_ckpt.callback.CheckpointStore", FailingStore)
    monkeypatch.setattr(FailingStore, "tried", ())
    return lambda *steps: monkeypatch.setattr(FailingStore, "failing", steps)


def test_a_failed_interval_save_does_not_end_training(tmp_path, failing_store, caplog):
    failing_store(4)
    _, history, checkpoint = fit(tmp_path, save_freq=2, max_to_keep=None)
    assert history.epoch == [0, 1]
    assert checkpoint.failed_saves == 1
    assert steps(tmp_path) == [2, 6, 8, 10]
    assert any("Saving step 4 failed" in r.message for r in caplog.records)


def test_a_failed_last_save_raises_and_names_the_newest(tmp_path, failing_store):
    failing_store(10)
    with pytest.raises(SaveFailedError, match=r"newest good checkpoint is step 8"):
        fit(tmp_path, save_freq=2, max_to_keep=None)


def test_a_failed_emergency_save_raises(tmp_path, failing_store):
    failing_store(6)

    def terminate(callback):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # A thread delivers the notice; further batches could begin meanwhile.

    with pytest.raises(SaveFailedError, match=r"step 6.*newest good checkpoint is step 4"):
        fit(tmp_path, save_freq=4, callbacks=[At(6, terminate)])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_max_failed_saves(tmp_path, failing_store):
    failing_store(*range(3, 10))
    with pytest.raises(SaveFailedError, match="3 saves failed in a row"):
        fit(tmp_path, save_freq=1, max_failed_saves=2)


def test_a_passing_error_is_retried(tmp_path, monkeypatch):
    calls = []
    original = store.write_checksums

    def flaky(directory):
        calls.append(directory.name)
        if len(calls) in (1, 2):
            raise OSError(errno.EIO, "Input/output error")
        original(directory)

    monkeypatch.setattr(store, "write_checksums", flaky)
    retry = RetryPolicy(first_wait_seconds=0.001)
    _, _, checkpoint = fit(tmp_path, epochs=1, retry=retry)
    assert len(calls) == 3
    assert checkpoint.failed_saves == 0
    assert steps(tmp_path) == [5]
    assert os.listdir(tmp_path) == ["5"]


def test_the_writer_process_may_die(tmp_path, caplog):
    import psutil

    def kill_writer(callback):
        for child in psutil.Process().children():
            if "writer_process" in " ".join(child.cmdline()):
                child.kill()

    callbacks = [At(5, kill_writer)]
    fit(tmp_path, save_on_background=True, save_freq=4, callbacks=callbacks, max_to_keep=None)
    assert steps(tmp_path) == [4, 8, 10]
