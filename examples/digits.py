"""A small CNN on scikit-learn's handwritten digits, which survives being killed.

    python examples/digits.py checkpoints          # train; kill it and start it again at will
    python examples/digits.py --demo               # do that here, and compare

The demo trains once undisturbed, then again with a SIGTERM and a SIGKILL from outside at
random moments, and prints what was lost and whether the results are bit-identical.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

EPOCHS = 6
BATCH = 32
SAVE_EVERY = 10


def train(directory: str) -> None:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    from resilient_ckpt import ResilientCheckpoint

    keras.utils.set_random_seed(1)
    digits = load_digits()
    x = digits.images[..., None].astype("float32") / 16.0
    y = digits.target
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv_1"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Conv2D(32, 3, activation="relu", name="conv_2"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dropout(0.3, name="drop"),
            keras.layers.Dense(10, activation="softmax", name="classes"),
        ],
        name="digits",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])

    class Watched(keras.callbacks.Callback):
        """Lets the demo see how far training is."""

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            print("BATCH", int(self.model.optimizer.iterations), flush=True)
            time.sleep(0.02)  # as if a batch took longer, so that it can be killed within

    history = model.fit(
        x[:1500],
        y[:1500],
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=(x[1500:], y[1500:]),
        callbacks=[
            Watched(),
            ResilientCheckpoint(directory, save_freq=SAVE_EVERY, keep_best=2, verbose=1),
        ],
        verbose=0,
    )
    weights = b"".join(np.asarray(v.value).tobytes() for v in model.variables)
    optimizer = b"".join(np.asarray(v.value).tobytes() for v in model.optimizer.variables)
    result = {
        "weights": hashlib.sha256(weights + optimizer).hexdigest(),
        "history": {name: [float(v) for v in values] for name, values in history.history.items()},
        "accuracy": float(history.history["val_accuracy"][-1]),
    }
    print("RESULT", json.dumps(result), flush=True)


@dataclass
class Run:
    """What was seen of a run from outside, over all its starts."""

    starts: int = 0
    kills: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    seconds: float = 0.0
    result: dict = field(default_factory=dict)


def watch(directory: Path, signals: list[str], rng: random.Random) -> Run:
    """Runs the script to its end, sending it one signal after the other."""
    import signal

    from resilient_ckpt.chaos import TrainingProcess

    from resilient_ckpt.store import CheckpointStore

    run = Run()
    began = time.monotonic()
    batches = EPOCHS * -(-1500 // BATCH)
    plan = sorted(rng.sample(range(SAVE_EVERY + 5, batches - 15), len(signals)))
    reached = 0
    while True:
        run.starts += 1
        command = [sys.executable, __file__, str(directory)]
        with TrainingProcess(command, echo=lambda line: _echo(line)) as process:
            if len(run.kills) == len(signals):
                process.wait_for_line(lambda line: line.startswith("RESULT"), timeout=300)
                process.wait()
            else:
                target = plan[len(run.kills)]
                process.wait_for_line(lambda line, t=target: _batch(line) >= t, timeout=300)
                time.sleep(rng.random() * 0.1)
                name = signals[len(run.kills)]
                process.send(getattr(signal, name))
                process.wait()
                reached = max(_batch(line) for line in process.lines)
                saved = CheckpointStore(directory).checkpoints()[-1].step
                run.kills.append(name)
                run.lost.append(max(0, reached - saved))
                print(f"  {name} after batch {reached}: checkpoint at {saved}", flush=True)
                continue
            line = next(line for line in process.lines if line.startswith("RESULT"))
            run.result = json.loads(line.removeprefix("RESULT "))
            run.seconds = time.monotonic() - began
            return run


def _batch(line: str) -> int:
    return int(line.split()[1]) if line.startswith("BATCH") else -1


def _echo(line: str) -> None:
    if line.startswith("Resumed"):
        print(f"  {line}", flush=True)


def demo(seed: int) -> int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        print("Undisturbed run ...", flush=True)
        calm = watch(Path(folder) / "calm", [], rng)
        print(f"Run with a SIGTERM and a SIGKILL at random moments (seed {seed}) ...", flush=True)
        rough = watch(Path(folder) / "rough", ["SIGTERM", "SIGKILL"], rng)
    weights = calm.result["weights"] == rough.result["weights"]
    history = calm.result["history"] == rough.result["history"]
    rows = [
        ("", "undisturbed", "killed"),
        ("kills", "0", ", ".join(rough.kills)),
        ("batches lost", "0", ", ".join(map(str, rough.lost))),
        ("restarts", "0", str(rough.starts - 1)),
        ("final accuracy", f"{calm.result['accuracy']:.4f}", f"{rough.result['accuracy']:.4f}"),
        ("seconds", f"{calm.seconds:.1f}", f"{rough.seconds:.1f}"),
        ("weights bit-identical", "", "yes" if weights else "NO"),
        ("History bit-identical", "", "yes" if history else "NO"),
    ]
    print()
    for title, left, right in rows:
        print(f"  {title:<24}{left:<16}{right}")
    return 0 if weights and history else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", default="checkpoints")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--seed", type=int, default=None, help="of the demo's kills")
    arguments = parser.parse_args()
    if arguments.demo:
        chosen = arguments.seed if arguments.seed is not None else random.randrange(10**6)
        sys.exit(demo(chosen))
    train(arguments.directory)
