"""Checks that a run killed at any batch resumes bit-identically, within one process.

A callback *photographs* the checkpoint directory after every batch: each photograph is
what a process killed there would have left. The script is then run again on every one of
them. The tests with real kills are in test_kills.py; this covers many more kinds of data
and models in the same time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from resilient_ckpt import ResilientCheckpoint, resume


def restart() -> None:
    """Makes this process forget what a new one could not know."""
    resume.process_runs.clear()
    keras.utils.clear_session()


@dataclass
class Outcome:
    weights: list[np.ndarray]
    optimizer: list[np.ndarray]
    history: dict[str, list[float]]
    epochs: list[int]
    extra: Any = None

    def assert_equal(self, other: Outcome) -> None:
        assert self.epochs == other.epochs
        assert self.history == other.history
        for kind in ("weights", "optimizer"):
            ours, theirs = getattr(self, kind), getattr(other, kind)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
        assert self.extra == other.extra


class Photographer(keras.callbacks.Callback):
    def __init__(self, checkpoint: ResilientCheckpoint, folder: Path) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.folder = folder
        self.photos: list[Path] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.checkpoint.wait_until_finished()
        photo = self.folder / f"photo-{len(self.photos)}"
        shutil.copytree(self.checkpoint.directory, photo)
        (photo / "resilient.lock").unlink()
        self.photos.append(photo)


@dataclass
class Script:
    """What a user would write: everything is made anew at every start."""

    model: Callable[[], keras.Model]
    data: Callable[[], dict[str, Any]]
    callbacks: Callable[[], Sequence[keras.callbacks.Callback]] = lambda: ()
    fit: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Sequence[keras.callbacks.Callback]], Any] = lambda callbacks: None

    def run(self, directory: Path | None, photos: Path | None = None) -> tuple[Outcome, list[Path]]:
        restart()
        keras.utils.set_random_seed(11)
        model = self.model()
        callbacks = list(self.callbacks())
        photographer = None
        if directory is not None:
            options = {"save_freq": 1, "save_on_background": False, "durability": "process"}
            checkpoint = ResilientCheckpoint(directory, **{**options, **self.options})
            if photos is not None:
                photographer = Photographer(checkpoint, photos)
                callbacks.append(photographer)
            callbacks.append(checkpoint)
        history = model.fit(
            **self.data(), **{"epochs": 3, "verbose": 0, **self.fit}, callbacks=callbacks
        )
        outcome = Outcome(
            [np.array(w) for w in model.get_weights()],
            [np.array(v.value) for v in model.optimizer.variables],
            {name: [float(v) for v in values] for name, values in history.history.items()},
            list(history.epoch),
            self.extra(callbacks),
        )
        return outcome, photographer.photos if photographer else []

    def assert_exact(self, tmp_path: Path, every: int = 3, bare: bool = True) -> None:
        undisturbed, _ = self.run(None if bare else tmp_path / "undisturbed")
        watched, photos = self.run(tmp_path / "watched", tmp_path)
        watched.assert_equal(undisturbed)
        assert len(photos) > 3
        # One is killed a second time, later on.
        again = tmp_path / "again"
        again.mkdir()
        twice, more_photos = self.run(photos.pop(2), again)
        twice.assert_equal(undisturbed)
        rarely = dataclasses.replace(self, options={**self.options, "save_freq": 10**6})
        for photo in [*photos[1::every], *more_photos[-1:]]:
            resumed, _ = rarely.run(photo)
            resumed.assert_equal(undisturbed)


def small_model(**compile_options: Any) -> keras.Model:
    inputs = keras.Input((8,), name="inputs")
    x = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.3, name="drop")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="out")(x), name="model")
    options: dict[str, Any] = {"optimizer": "adam", "loss": "mse", "metrics": ["mae"]}
    model.compile(**{**options, **compile_options})
    return model


def numbers(count: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 8)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)
