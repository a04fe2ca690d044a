"""A training script for the tests: run as a process of its own, killed and started again.

Prints one line of JSON for every moment that the tests wait for, and the result at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from resilient_ckpt import ResilientCheckpoint


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def build(arguments: argparse.Namespace) -> keras.Model:
    inputs = keras.Input((8,), name="inputs")
    x = keras.layers.Dense(16, activation="relu", name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.3, name="drop")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="out")(x), name="model")
    model.compile(
        keras.optimizers.Adam(0.01),
        "mse",
        metrics=["mae"],
        steps_per_execution=arguments.steps_per_execution,
    )
    return model


class Moments(keras.callbacks.Callback):
    """Says where training is, and is slow or kills itself where it is told to."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments
        self.step = 0

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def moment(self, name: str, **details: object) -> None:
        say(moment=name, **details)
        if self.arguments.slow_in == name:
            time.sleep(self.arguments.slow_seconds)

    def on_train_batch_begin(self, batch, logs=None):
        self.moment("batch_begin", batch=batch)

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.arguments.fork and self.step == 1 and os.fork() == 0:
            time.sleep(60)
            os._exit(1)
        self.moment("batch_end", step=self.step)
        if self.step == self.arguments.kill_after:
            os.kill(os.getpid(), 9)
        if self.step == self.arguments.fail_after:
            raise RuntimeError("made to fail")

    def on_test_batch_end(self, batch, logs=None):
        self.moment("test_batch_end", batch=batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.moment("epoch_begin", epoch=epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.moment("epoch_end", epoch=epoch)


def hang_in_c() -> None:
    """Waits for ever in C, where no signal handler of Python runs."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)  # zeros: PTHREAD_MUTEX_INITIALIZER
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


class SlowData(keras.utils.PyDataset):
    """Sleeps before one batch."""

    def __init__(self, x, y, slow_at: int, seconds: float, hang: bool) -> None:
        super().__init__()
        self.x, self.y, self.slow_at, self.seconds, self.hang = x, y, slow_at, seconds, hang

    def __len__(self) -> int:
        return len(self.x) // 8

    def __getitem__(self, index):
        if index == self.slow_at:
            say(moment="data_wait")
            if self.seconds > 0 and self.hang:
                hang_in_c()
            time.sleep(self.seconds)
        part = slice(index * 8, index * 8 + 8)
        return self.x[part], self.y[part]


class SlowLayer(keras.layers.Layer):
    """Makes one step long inside XLA, where no Python handler runs."""

    def __init__(self, rounds: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rounds = rounds

    def call(self, inputs):
        import jax

        def body(_, value):
            return value @ value / 200.0

        big = jax.numpy.ones((400, 400)) + inputs.sum() * 0
        spun = jax.lax.fori_loop(0, self.rounds, body, big)
        return inputs + 0.0 * spun[0, 0]


def digest(model: keras.Model) -> str:
    hasher = hashlib.sha256()
    for variable in [*model.variables, *model.optimizer.variables]:
        hasher.update(np.asarray(variable.value).tobytes())
    return hasher.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--fail-after", type=int)
    parser.add_argument("--slow-in", default="")
    parser.add_argument("--slow-seconds", type=float, default=2.0)
    parser.add_argument("--slow-data", type=int, default=-1)
    parser.add_argument("--hang", action="store_true", help="slow data never comes")
    parser.add_argument("--slow-step", type=int, default=0)
    parser.add_argument("--steps-per-execution", type=int, default=1)
    parser.add_argument("--options", default="{}")
    parser.add_argument("--weight-megabytes", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="fork a child within fit")
    parser.add_argument("--plain", action="store_true", help="without this package")
    arguments = parser.parse_args()
    # As in a terminal: what starts the tests may have SIGINT ignored (nohup, a background job).
    signal.signal(signal.SIGINT, signal.default_int_handler)

    keras.utils.set_random_seed(7)
    data = np.random.default_rng(0)
    x = data.normal(size=(40, 8)).astype("float32")
    y = (x.sum(axis=1, keepdims=True) + data.normal(size=(40, 1))).astype("float32")
    model = build(arguments)
    if arguments.slow_step or arguments.weight_megabytes:
        inputs = keras.Input((8,), name="inputs")
        hidden = inputs
        if arguments.slow_step:
            hidden = SlowLayer(arguments.slow_step, name="slow")(hidden)
        if arguments.weight_megabytes:
            width = arguments.weight_megabytes * 1_000_000 // 4 // 9
            wide = keras.layers.Dense(width, name="wide")(hidden)
            hidden = hidden + keras.ops.mean(wide, axis=1, keepdims=True)
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(hidden), name="model")
        model.compile("adam", "mse", metrics=["mae"])
    callbacks = [
        Moments(arguments),
        keras.callbacks.EarlyStopping("val_loss", patience=20, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.5),
    ]
    if not arguments.plain:
        options = {"save_freq": 1, **json.loads(arguments.options)}
        callbacks.append(ResilientCheckpoint(arguments.directory, verbose=1, **options))
    source = (
        (x, y)
        if arguments.slow_data < 0
        else (
            SlowData(x, y, arguments.slow_data, arguments.slow_seconds, arguments.hang),
            None,
        )
    )
    say(moment="fit")
    history = model.fit(
        *source,
        batch_size=8 if arguments.slow_data < 0 else None,
        epochs=arguments.epochs,
        validation_data=(x[:16] + 1, y[:16]),
        validation_batch_size=4,
        callbacks=callbacks,
        verbose=0,
    )
    say(
        result=digest(model),
        history={name: [float(v) for v in values] for name, values in history.history.items()},
        epochs=history.epoch,
        steps=callbacks[0].step,
    )


if __name__ == "__main__":
    sys.exit(main())
