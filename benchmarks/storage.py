"""What checksums, durability and the mirror cost, side by side with the peers, in one process.

    python benchmarks/storage.py --megabytes 300 --rounds 3 --markdown results.md

Save and restore against plain Orbax and against a raw write and fsync of the same bytes; the
mirror against `rclone copy` of the same directory to the same S3 server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import orbax.checkpoint
from resilient_ckpt.chaos.s3 import ACCESS_KEY, SECRET_KEY, S3Server, find_rclone

import resilient_ckpt.store as store_module
from resilient_ckpt.mirror import Mirror
from resilient_ckpt.record import Root
from resilient_ckpt.store import CheckpointStore, SaveJob, Target

ocp = orbax.checkpoint.v1
ARRAYS = 20


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(directory: Path) -> None:
    """Takes the files out of the page cache, so that reading them is reading the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Stopwatch:
    """Times the calls of one function of the store module."""

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        inner = getattr(store_module, name)

        def watched(*arguments: object, **options: object) -> object:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(store_module, name, watched)


def save_and_restore(megabytes: int, rounds: int, folder: Path) -> list[str]:
    random = np.random.default_rng(0)
    size = megabytes * 1_000_000 // 4 // ARRAYS
    arrays = [random.normal(size=size).astype("float32") for _ in range(ARRAYS)]
    tree = {f"v{index}": index for index in range(ARRAYS)}
    job = SaveJob((Target(Root.PUBLIC, 1, {"pytree": tree}),), {}, tuple(range(ARRAYS)))
    context = ocp.Context()
    context.array_options.saving.use_compression = False

    def raw(path: Path) -> None:
        with open(path / "raw", "wb") as file:
            for array in arrays:
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())

    def plain(path: Path) -> None:
        state = {name: arrays[index] for name, index in tree.items()}
        ocp.save_checkpointables(path / "1", {"pytree": state})

    def uncompressed(path: Path) -> None:
        with context:
            plain(path)

    summing, verifying = Stopwatch("write_checksums"), Stopwatch("verify")
    savers = {
        "raw write and fsync": raw,
        "Orbax": plain,
        "Orbax without compression": uncompressed,
        'CheckpointStore, durability="process"': lambda path: CheckpointStore(
            path, durability="process"
        ).save(job, arrays),
        'CheckpointStore, durability="power-loss"': lambda path: CheckpointStore(path).save(
            job, arrays
        ),
    }
    saving: dict[str, list[float]] = defaultdict(list)
    restoring: dict[str, list[float]] = defaultdict(list)
    sums: list[float] = []
    verified: list[float] = []
    for turn in range(rounds + 1):
        for name, save in savers.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
            summing.seconds = verifying.seconds = 0.0
            saved = timed(lambda save=save: save(folder))
            forget(folder)
            if name.startswith("raw"):
                restored = timed(lambda: (folder / "raw").read_bytes())
            elif name.startswith("Orbax"):
                restored = timed(lambda: ocp.load_checkpointables(folder / "1", {"pytree": None}))
            else:
                store = CheckpointStore(folder)
                restored = timed(lambda store=store: store.load_newest(["pytree"]))
            if turn:  # the first round warms up
                saving[name].append(saved)
                restoring[name].append(restored)
                if "power-loss" in name:
                    sums.append(summing.seconds)
                    verified.append(verifying.seconds)
    base = statistics.median(saving["Orbax without compression"])
    back = statistics.median(restoring["Orbax without compression"])
    rows = [
        "| | save, s | ÷ Orbax without compression | restore from disk, s | ÷ Orbax without "
        "compression |",
        "|---|---|---|---|---|",
    ]
    for name in savers:
        saved, restored = statistics.median(saving[name]), statistics.median(restoring[name])
        rows.append(
            f"| {name} | {saved:.2f} | {saved / base:.2f} | {restored:.2f} "
            f"| {restored / back:.2f} |"
        )
    rows += [
        f"| of which checksums | {statistics.median(sums):.2f} "
        f"| {statistics.median(sums) / base:.2f} | {statistics.median(verified):.2f} "
        f"| {statistics.median(verified) / back:.2f} |",
        "",
        "Verifying reads the files from the disk; Orbax then finds them in the page cache.",
    ]
    return rows


def mirror(megabytes: int, rounds: int, folder: Path) -> list[str]:
    random = np.random.default_rng(0)
    size = megabytes * 1_000_000 // 4 // ARRAYS
    arrays = [random.normal(size=size).astype("float32") for _ in range(ARRAYS)]
    tree = {f"v{index}": index for index in range(ARRAYS)}
    local = folder / "local"
    shutil.rmtree(folder, ignore_errors=True)
    CheckpointStore(local).save(SaveJob((Target(Root.PUBLIC, 1, {"pytree": tree}),), {}), arrays)
    rclone = find_rclone()
    assert rclone is not None
    served = folder / "served"
    (served / "bucket").mkdir(parents=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    with S3Server(served) as server:
        os.environ.update(server.environment)
        remote = {
            "RCLONE_CONFIG_BENCH_TYPE": "s3",
            "RCLONE_CONFIG_BENCH_PROVIDER": "Rclone",
            "RCLONE_CONFIG_BENCH_ENDPOINT": server.environment["AWS_ENDPOINT_URL"],
            "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": ACCESS_KEY,
            "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": SECRET_KEY,
        }
        for turn in range(rounds):
            command = [rclone, "copy", "--config", "", str(local / "1"), f"bench:bucket/r{turn}"]
            seconds["rclone copy"].append(
                timed(
                    lambda command=command: subprocess.run(
                        command, check=True, env={**os.environ, **remote}
                    )
                )
            )
            place = Mirror(f"s3://bucket/m{turn}")
            seconds["Mirror.upload"].append(
                timed(lambda place=place: place.upload(local, local / "1"))
            )
    rows = ["| | s | MB/s | ÷ rclone copy |", "|---|---|---|---|"]
    base = statistics.median(seconds["rclone copy"])
    for name, taken in seconds.items():
        own = statistics.median(taken)
        rows.append(f"| {name} | {own:.2f} | {megabytes / own:.0f} | {own / base:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[300])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / "benchmark"
        for megabytes in arguments.megabytes:
            sections += [f"### {megabytes} MB", ""]
            sections += [*save_and_restore(megabytes, arguments.rounds, folder), ""]
            sections += [*mirror(megabytes, arguments.rounds, folder), ""]
    text = "\n".join(sections)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
