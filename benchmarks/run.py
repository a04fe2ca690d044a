"""What checkpoints cost the training loop, side by side with the peers, in one process.

    python benchmarks/run.py --markdown results.md [--megabytes 100 300 1000]

(a) per batch, when nothing is to be saved; (b) per save: the longest gap between two
batches, and how much longer the run takes; (c) 10 000 small arrays against one large one.
Rounds of the peers are interleaved; figures are medians, and ratios to the first peer.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import orbax.checkpoint

from resilient_ckpt import ResilientCheckpoint
from resilient_ckpt.engine import Captured, Engine, EngineOptions, Measurement
from resilient_ckpt.policy import EveryBatches, Progress
from resilient_ckpt.store import CheckpointStore

Factory = Callable[[str, int], keras.callbacks.Callback | None]

NEVER = 10**9

PEERS: dict[str, Factory] = {
    "no checkpoints": lambda folder, every: None,
    "OrbaxCheckpoint, background": lambda folder, every: keras.callbacks.OrbaxCheckpoint(
        folder, save_freq=every
    ),
    "OrbaxCheckpoint, synchronous": lambda folder, every: keras.callbacks.OrbaxCheckpoint(
        folder, save_freq=every, save_on_background=False
    ),
    "ModelCheckpoint": lambda folder, every: keras.callbacks.ModelCheckpoint(
        f"{folder}/model.keras", save_freq=every
    ),
    "BackupAndRestore": lambda folder, every: keras.callbacks.BackupAndRestore(
        folder, save_freq=every, delete_checkpoint=False
    ),
    "ResilientCheckpoint": lambda folder, every: ResilientCheckpoint(folder, save_freq=every),
}


class Clock(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.times.append(time.perf_counter())


def per_batch(rounds: int, batches: int) -> list[str]:
    x, y = np.ones((batches, 4), "float32"), np.ones((batches, 1), "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    names = ["no checkpoints", "OrbaxCheckpoint, background", "ResilientCheckpoint"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                callback = PEERS[name](folder, NEVER)
                began = []
                starter = keras.callbacks.LambdaCallback(
                    on_epoch_begin=lambda *_, began=began: began.append(time.perf_counter())
                )
                ended = keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda *_, began=began: began.append(time.perf_counter())
                )
                callbacks = [starter, *([callback] if callback else [])]
                callbacks.insert(0, ended)
                model.fit(x, y, batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
                if turn:
                    seconds[name].append((began[1] - began[0]) / batches)
    base = statistics.median(seconds[names[0]])
    rows = ["| | µs per batch | more than without |", "|---|---|---|"]
    for name in names:
        own = statistics.median(seconds[name])
        rows.append(f"| {name} | {own * 1e6:.1f} | {(own - base) * 1e6:+.1f} µs |")
    return rows


def model_of(megabytes: float) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """A model whose weights and Adam moments are so large together."""
    width = int((megabytes * 1e6 / 3 / 4 / 2) ** 0.5)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((width,))
    hidden = keras.layers.Dense(width, kernel_initializer="random_normal")(inputs)
    outputs = keras.layers.Dense(width, kernel_initializer="random_normal")(hidden)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(1e-5), "mse")
    data = np.random.default_rng(0)
    x = data.normal(size=(64, width)).astype("float32")
    return model, x, x[:, ::-1].copy()


def memcpy_seconds(model: keras.Model) -> float:
    arrays = [np.array(v.value) for v in [*model.variables, *model.optimizer.variables]]
    targets = [np.copy(array) for array in arrays]
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        for target, array in zip(targets, arrays, strict=True):
            np.copyto(target, array)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def per_save(megabytes: int, rounds: int, saves: int, folder: Path) -> list[str]:
    model, x, y = model_of(megabytes)
    clock = Clock()
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[clock])
    step = statistics.median(np.diff(clock.times[8:]))
    copy = memcpy_seconds(model)
    # Far enough apart that every peer has finished one save before the next.
    every = int(max(12, 3.0 * megabytes / 300 / step))
    # The last batch is no save's batch; only ResilientCheckpoint saves at the end as well.
    steps = every * saves + every // 2
    gaps: dict[str, list[float]] = {name: [] for name in PEERS}
    extra: dict[str, list[float]] = {name: [] for name in PEERS}
    ends: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(rounds):
        for name, factory in PEERS.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            gc.collect()
            clock = Clock()
            callback = factory(str(folder), every)
            indices = np.arange(steps * 8) % 64
            callbacks = [clock, *([callback] if callback else [])]
            model.optimizer.iterations.assign(0)
            model.fit(
                x[indices],
                y[indices],
                batch_size=8,
                shuffle=False,
                verbose=0,
                callbacks=callbacks,
            )
            # From the first batch to the return of fit, over what so many undisturbed
            # batches take: the median is that of the batches far from a save.
            returned = time.perf_counter()
            whole = returned - clock.times[0]
            undisturbed = float(np.median(np.diff(clock.times))) * (steps - 1)
            done = saves + (1 if isinstance(callback, ResilientCheckpoint) else 0)
            gaps[name].append(float(np.max(np.diff(clock.times))))
            extra[name].append((whole - undisturbed) / done)
            ends[name].append(returned - clock.times[-1])
            print(
                f"  {megabytes} MB {name}: gap {gaps[name][-1]:.3f} s, extra per save "
                f"{extra[name][-1]:.3f} s, saves {done}",
                flush=True,
            )
    reference = statistics.median(extra["OrbaxCheckpoint, background"])
    allowed = step + 1.5 * copy
    rows = [
        f"State {megabytes} MB, step {step * 1e3:.0f} ms, memcpy into warm buffers "
        f"{copy * 1e3:.0f} ms (one step + 1.5 memcpy = {allowed * 1e3:.0f} ms).",
        "",
        "| | longest gap, ms | ÷ (step + 1.5 memcpy) | extra run time per save, ms "
        "| ÷ OrbaxCheckpoint background | from the last batch to the return of fit, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in PEERS:
        gap, more = statistics.median(gaps[name]), statistics.median(extra[name])
        rows.append(
            f"| {name} | {gap * 1e3:.0f} | {gap / allowed:.2f} | {more * 1e3:.0f} "
            f"| {more / reference:.2f} | {statistics.median(ends[name]) * 1e3:.0f} |"
        )
    return rows


def many_small(megabytes: int, folder: Path) -> list[str]:
    rows = [
        "| | arrays | loop stops for, ms | loop takes so many times as long while saving "
        "| until committed, s |",
        "|---|---|---|---|---|",
    ]
    for count in (10_000, 1):
        size = megabytes * 1_000_000 // 4 // count
        random = np.random.default_rng(0)
        leaves = [jnp.asarray(random.normal(size=size).astype("float32")) for _ in range(count)]
        for name in ("OrbaxCheckpoint's Checkpointer, async", "this package's engine"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            row = (_save_theirs if "Orbax" in name else _save_ours)(leaves, folder)
            rows.append(f"| {name} | {count} | {row[0] * 1e3:.0f} | {row[1]:.2f} | {row[2]:.1f} |")
            print(rows[-1], flush=True)
    return rows


def _work() -> Callable[[], float]:
    matrix = jnp.ones((300, 300))
    step = jax.jit(lambda m: m @ m / 300.0)
    jax.block_until_ready(step(matrix))

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(step(matrix))
        return time.perf_counter() - began

    return run


def _watch(save: Callable[[], None], done: Callable[[], bool]) -> tuple[float, float, float]:
    run = _work()
    alone = statistics.mean(run() for _ in range(2000))
    began = time.perf_counter()
    save()
    stopped = time.perf_counter() - began
    meanwhile = []
    while not done():
        meanwhile.append(run())
    slower = statistics.mean(meanwhile) / alone if meanwhile else 1.0
    return stopped, slower, time.perf_counter() - began


def _save_theirs(leaves: list[jax.Array], folder: Path) -> tuple[float, float, float]:
    checkpointer = orbax.checkpoint.v1.training.Checkpointer(folder)
    tree = {f"v{index}": leaf for index, leaf in enumerate(leaves)}
    futures = []

    def save() -> None:
        futures.append(checkpointer.save_checkpointables_async(1, {"pytree": tree}))

    import threading

    def wait() -> None:
        futures[0].result()

    thread = threading.Thread(target=wait)
    figures = _watch(lambda: (save(), thread.start())[1], lambda: not thread.is_alive())
    checkpointer.close()
    return figures


def _save_ours(leaves: list[jax.Array], folder: Path) -> tuple[float, float, float]:
    tree = {f"v{index}": index for index in range(len(leaves))}
    captured = Captured(leaves, {"pytree": tree}, tree, (), {}, {})
    engine = Engine(CheckpointStore(folder), EveryBatches(1), EngineOptions())
    engine.open(["pytree"])
    engine.begin(Progress(0, 0, 0, 0.0), leaves)

    def save(step: int) -> None:
        engine.save_interval(
            Progress(step, 0, step, 0.0), lambda: captured, Measurement(), "interval", True
        )

    save(1)  # The first save starts the writer process.
    engine.wait()
    figures = _watch(
        lambda: save(2), lambda: engine.committed is not None and engine.committed.step == 2
    )
    engine.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100, 300, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--only", choices=["a", "b", "c"], nargs="*", default=["a", "b", "c"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / "benchmark"
        sections = []
        if "a" in arguments.only:
            sections += ["### (a) Per batch, nothing to save", "", *per_batch(5, 3000), ""]
        if "b" in arguments.only:
            sections += ["### (b) Per save", ""]
            for megabytes in arguments.megabytes:
                sections += [*per_save(megabytes, arguments.rounds, arguments.saves, folder), ""]
        if "c" in arguments.only:
            sections += ["### (c) Many small arrays, 40 MB in all", "", *many_small(40, folder), ""]
    text = "\n".join(sections)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
