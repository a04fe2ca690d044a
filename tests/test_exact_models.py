"""Exact resume for every kind of model, optimizer and callback."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from exact import Script, numbers, restart, small_model


def data():
    x, y = numbers()
    return {"x": x, "y": y, "batch_size": 4}


VALIDATION = {"validation_data": numbers(8, seed=1)}


def test_mixed_precision_with_loss_scaling(tmp_path):
    def model():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            return small_model(
                optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
            )
        finally:
            keras.config.set_dtype_policy("float32")

    Script(model, data).assert_exact(tmp_path)


def test_bfloat16(tmp_path):
    def model():
        keras.config.set_dtype_policy("bfloat16")
        try:
            return small_model()
        finally:
            keras.config.set_dtype_policy("float32")

    Script(model, data).assert_exact(tmp_path, every=4)


def test_ema_and_gradient_accumulation(tmp_path):
    model = lambda: small_model(  # noqa: E731
        optimizer=keras.optimizers.AdamW(
            0.01, use_ema=True, ema_overwrite_frequency=4, gradient_accumulation_steps=3
        )
    )
    Script(model, data, fit=VALIDATION).assert_exact(tmp_path)


def test_learning_rate_schedule(tmp_path):
    rate = lambda: keras.optimizers.schedules.CosineDecay(0.001, 15)  # noqa: E731
    model = lambda: small_model(optimizer=keras.optimizers.SGD(rate(), momentum=0.9))  # noqa: E731
    Script(model, data).assert_exact(tmp_path, every=4)


def test_run_eagerly(tmp_path):
    model = lambda: small_model(run_eagerly=True)  # noqa: E731
    Script(model, data, fit={"epochs": 2}).assert_exact(tmp_path, every=4)


class Subclassed(keras.Model):
    """Built by its first batch, with a train_step and a metric of its own."""

    def __init__(self):
        super().__init__(name="subclassed")
        self.hidden = keras.layers.Dense(6, name="hidden")
        self.noise = keras.layers.GaussianNoise(0.1, name="noise")
        self.out = keras.layers.Dense(1, name="out")
        self.tracker = keras.metrics.Mean(name="own_loss")

    def call(self, inputs, training=False):
        return self.out(self.noise(self.hidden(inputs), training=training))

    def train_step(self, state, data):
        logs, state = super().train_step(state, data)
        return {**logs, "double": logs["loss"] * 2}, state


def test_subclassed_model_with_its_own_train_step(tmp_path):
    def model():
        subclassed = Subclassed()
        subclassed.compile("adam", "mse")
        return subclassed

    Script(model, data, fit=VALIDATION).assert_exact(tmp_path)


def callbacks_script(make, extra=lambda callbacks: None, **options):
    return Script(small_model, data, make, fit=VALIDATION, options=options, extra=extra)


def test_early_stopping_that_stops_and_restores_the_best_weights(tmp_path):
    make = lambda: [  # noqa: E731
        keras.callbacks.EarlyStopping(
            "val_loss", mode="max", patience=1, restore_best_weights=True, verbose=0
        )
    ]
    script = Script(small_model, data, make, fit={**VALIDATION, "epochs": 6})
    script.assert_exact(tmp_path)
    # The run had stopped early: started again, it does nothing and gives the same.
    first, _ = script.run(tmp_path / "stopped")
    assert len(first.epochs) < 6
    again, _ = script.run(tmp_path / "stopped")
    again.assert_equal(first)


def test_reduce_lr_on_plateau_and_scheduler(tmp_path):
    make = lambda: [  # noqa: E731
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=10.0)
    ]
    callbacks_script(make).assert_exact(tmp_path, every=4)


def test_learning_rate_scheduler_that_multiplies(tmp_path):
    make = lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)]  # noqa: E731
    callbacks_script(make).assert_exact(tmp_path, every=2)


def test_swap_ema_weights(tmp_path):
    model = lambda: small_model(optimizer=keras.optimizers.Adam(0.01, use_ema=True))  # noqa: E731
    make = lambda: [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]  # noqa: E731
    Script(model, data, make, fit=VALIDATION).assert_exact(tmp_path, every=4)


class Counting(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.batches += 1


class Told(Counting):
    def get_state(self):
        return {"batches": self.batches, "array": np.arange(2000)}

    def set_state(self, state):
        self.batches = state["batches"]
        assert state["array"].shape == (2000,)


def test_callback_with_get_state(tmp_path):
    callbacks_script(lambda: [Told()], extra=lambda cs: cs[0].batches).assert_exact(tmp_path)


def test_a_callback_that_cannot_be_restored_is_named(tmp_path, caplog):
    script = callbacks_script(lambda: [Counting()])
    _, photos = script.run(tmp_path / "watched", tmp_path)
    script.run(photos[3])
    said = [r.message for r in caplog.records if "Counting is not restored" in r.message]
    assert len(said) == 1


@pytest.mark.parametrize("append", [True, False])
def test_csv_logger(tmp_path, append):
    def run(directory, photos=None):
        log = tmp_path / f"{directory.name}.csv"
        make = lambda: [keras.callbacks.CSVLogger(log, append=append)]  # noqa: E731
        _, taken = callbacks_script(make).run(directory, photos)
        return log, taken

    whole, photos = run(tmp_path / "watched", tmp_path)
    for photo in photos[6::4]:
        # The killed process had written on: rows of epochs that come again.
        log = tmp_path / f"{photo.name}.csv"
        log.write_text("".join(whole.read_text().splitlines(keepends=True)[:3]))
        if photo == photos[6]:
            log.write_text("".join(whole.read_text().splitlines(keepends=True)[:2]))
        run(photo)
        assert log.read_text() == whole.read_text()


def test_tensorboard_step(tmp_path):
    pytest.importorskip("tensorboard")
    make = lambda: [keras.callbacks.TensorBoard(tmp_path / "logs", update_freq="epoch")]  # noqa: E731
    extra = lambda callbacks: callbacks[0]._global_train_batch  # noqa: E731
    callbacks_script(make, extra).assert_exact(tmp_path, every=6)


def test_order_in_the_callback_list_does_not_matter(tmp_path):
    from resilient_ckpt import ResilientCheckpoint

    def fit(directory, stop_after):
        restart()
        keras.utils.set_random_seed(3)
        model = small_model()
        seen = []

        class Stop(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                seen.append(batch)
                if len(seen) == stop_after:
                    raise KeyboardInterrupt

        checkpoint = ResilientCheckpoint(directory, save_freq=1, save_on_background=False)
        stopping = keras.callbacks.EarlyStopping("val_loss", patience=5)
        callbacks = [checkpoint, stopping, Stop()]  # Ours first: it takes the last place.
        return model.fit(**data(), **VALIDATION, epochs=3, verbose=0, callbacks=callbacks), stopping

    history, stopping = fit(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", 11)
    resumed, resumed_stopping = fit(tmp_path / "cut", None)
    assert resumed.history == history.history
    assert (resumed_stopping.best, resumed_stopping.wait) == (stopping.best, stopping.wait)
