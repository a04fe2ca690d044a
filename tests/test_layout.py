"""What lies in the directory, and what plain Keras makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from exact import numbers, restart, small_model

from resilient_ckpt import EpochEnd, EveryBatches, ResilientCheckpoint
from resilient_ckpt.record import Root
from resilient_ckpt.store import CheckpointStore

PLAIN_KERAS = """
import os, sys, json, hashlib
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np
directory, weights_only = sys.argv[1], sys.argv[2] == "weights"
def digest(model):
    return hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()
inputs = keras.Input((8,), name="inputs")
x = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
x = keras.layers.BatchNormalization(name="norm")(x)
x = keras.layers.Dropout(0.3, name="drop")(x)
model = keras.Model(inputs, keras.layers.Dense(1, name="out")(x), name="model")
model.compile("adam", "mse", metrics=["mae"])
model.load_weights(directory)
found = {"load_weights": digest(model)}
if not weights_only:
    loaded = keras.saving.load_model(directory)
    found["load_model"] = digest(loaded)
    found["compiled"] = loaded.compiled
assert not any(name.startswith("resilient_ckpt") for name in sys.modules)
print(json.dumps(found))
"""


def digest(weights) -> str:
    import hashlib

    return hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()


def read_with_plain_keras(directory: Path, kind: str = "full") -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", PLAIN_KERAS, str(directory), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Weights(keras.callbacks.Callback):
    """Remembers the weights at the end of each epoch, and steers the monitored value."""

    def __init__(self, values=()):
        super().__init__()
        self.values = list(values)
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append([np.array(w) for w in self.model.get_weights()])
        if self.values:
            logs["score"] = self.values[epoch]


def fit(directory, epochs=4, scores=(), **options):
    restart()
    keras.utils.set_random_seed(5)
    model = small_model()
    x, y = numbers()
    weights = Weights(scores)
    checkpoint = ResilientCheckpoint(directory, **options)
    model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[weights, checkpoint])
    return model, weights.seen, checkpoint


def steps(directory, root=Root.PUBLIC):
    return [c.step for c in CheckpointStore(directory).checkpoints() if c.root is root]


@pytest.mark.parametrize("background", [True, False])
def test_plain_keras_reads_the_newest(tmp_path, background):
    _, seen, _ = fit(tmp_path, save_on_background=background)
    # Nothing else lies there but the one checkpoint, and the one to fall back on.
    assert sorted(os.listdir(tmp_path)) == ["20", "resume"]
    assert os.listdir(tmp_path / "resume") == ["15"]
    found = read_with_plain_keras(tmp_path)
    assert found == {
        "load_weights": digest(seen[-1]),
        "load_model": digest(seen[-1]),
        "compiled": True,
    }


def test_plain_keras_reads_the_best_with_save_best_only(tmp_path):
    scores = [3.0, 1.0, 2.0, 4.0]
    options = {"monitor": "score", "mode": "min", "save_best_only": True}
    _, seen, checkpoint = fit(tmp_path, scores=scores, **options)
    assert steps(tmp_path) == [10]
    assert steps(tmp_path, Root.RESUME)[-1] == 20
    assert checkpoint.best == 1.0
    found = read_with_plain_keras(tmp_path)
    assert found["load_weights"] == found["load_model"] == digest(seen[1])
    # Resume goes on from the newest, and the best value is not forgotten.
    model, _, checkpoint = fit(tmp_path, epochs=6, scores=[*scores, 1.5, 0.5], **options)
    assert checkpoint.best == 0.5
    assert steps(tmp_path) == [30]
    assert int(model.optimizer.iterations) == 30


def test_plain_keras_reads_weights_only(tmp_path):
    _, seen, _ = fit(tmp_path, save_weights_only=True)
    assert read_with_plain_keras(tmp_path, "weights") == {"load_weights": digest(seen[-1])}
    with pytest.raises(ValueError, match="save_weights_only=True"):
        keras.saving.load_model(tmp_path)
    model, _, _ = fit(tmp_path, epochs=5, save_weights_only=True)
    assert int(model.optimizer.iterations) == 25


def test_interval_and_best_together(tmp_path):
    scores = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    fit(
        tmp_path,
        epochs=6,
        scores=scores,
        save_freq=3,
        max_to_keep=2,
        keep_best=2,
        monitor="score",
        mode="min",
    )
    # The best are those of epochs 2 and 4; the newest at batches 27 and 30 (the end).
    assert steps(tmp_path) == [10, 20, 27, 30]
    assert steps(tmp_path, Root.RESUME) == []


def test_max_to_keep_none_keeps_all(tmp_path):
    fit(tmp_path, save_freq=2, max_to_keep=None)
    assert steps(tmp_path) == list(range(2, 21, 2))


def test_policies_are_combined(tmp_path):
    fit(tmp_path, save_freq=EveryBatches(7) | EpochEnd(2), max_to_keep=None)
    # Every save counts for both: 7, then the end of epoch 2 at 10, then 17, then 20.
    assert steps(tmp_path) == [7, 10, 17, 20]


def test_batches_are_counted_over_epochs_and_restarts(tmp_path):
    fit(tmp_path, epochs=1, save_freq=4, max_to_keep=None)
    fit(tmp_path, epochs=3, save_freq=4, max_to_keep=None)
    assert steps(tmp_path) == [4, 5, 8, 12, 15]


def test_initial_value_threshold(tmp_path):
    options = {"monitor": "score", "mode": "max", "save_best_only": True}
    fit(tmp_path, scores=[1.0, 2.0, 3.0, 4.0], initial_value_threshold=9.0, **options)
    assert steps(tmp_path) == []
    assert steps(tmp_path, Root.RESUME)[-1] == 20


def test_best_needs_its_metric(tmp_path):
    with pytest.warns(UserWarning, match="judged by `nothing`, which is not available"):
        fit(tmp_path, monitor="nothing", mode="min", save_best_only=True)
    assert steps(tmp_path) == []


def test_a_run_of_plain_orbax_checkpoint_is_taken_over(tmp_path, caplog):
    restart()
    keras.utils.set_random_seed(5)
    model = small_model()
    x, y = numbers()
    theirs = keras.callbacks.OrbaxCheckpoint(tmp_path, save_freq="epoch")
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[theirs])
    restart()
    resumed = small_model()
    seen = []
    first = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append((epoch, int(resumed.optimizer.iterations)))
    )
    callbacks = [first, ResilientCheckpoint(tmp_path)]
    resumed.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=callbacks)
    assert seen == [(2, 10)]
    assert any("was not written by this package" in r.message for r in caplog.records)


SHARDED = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
directory, epochs = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, sys.argv[3])
import keras
from exact import numbers, small_model
from test_layout import digest
from resilient_ckpt import ResilientCheckpoint
layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2,), ["data"]))
layout["hidden/kernel"] = (None, "data")
keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))
keras.utils.set_random_seed(1)
model = small_model()
x, y = numbers()
model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[ResilientCheckpoint(directory)])
assert len(model.get_layer("hidden").kernel.value.sharding.device_set) == 2
print(digest(model.get_weights()))
"""


def test_sharded_over_devices(tmp_path):
    def run(name, epochs):
        arguments = [str(tmp_path / name), str(epochs), str(Path(__file__).parent)]
        command = [sys.executable, "-c", SHARDED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    run("cut", 1)
    assert run("cut", 3) == run("whole", 3)
