"""Storage that fails: damaged, full, read-only, forbidden, deleted, hanging."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest
from exact import numbers, restart, small_model
from resilient_ckpt.chaos.power_loss import has_strace

from resilient_ckpt import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    CheckpointStore,
    CheckpointUnreadableError,
    DirectoryInUseError,
    ResilientCheckpoint,
    RetentionPolicy,
    RetryPolicy,
    SaveFailedError,
    integrity,
)
from resilient_ckpt.integrity import CHECKSUMS_NAME, parse_checksums, verify
from resilient_ckpt.lock import LOCK_NAME
from resilient_ckpt.record import Root
from resilient_ckpt.store import SaveJob, Target

QUICK = RetryPolicy(budget_seconds=0.3, first_wait_seconds=0.01)

# What is damaged.


def array(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=3000)


def job(step: int, **record: object) -> SaveJob:
    target = Target(Root.PUBLIC, step, {"pytree": {"a": {"w": 0, "b": 1}}})
    return SaveJob((target,), {"epoch": step, "batch": 0, **record}, (0, 1))


def save(store: CheckpointStore, step: int) -> None:
    store.save(job(step), [array(step), np.ones(5) * step])


def three_steps(directory: Path) -> CheckpointStore:
    store = CheckpointStore(directory, RetentionPolicy(3), "process")
    for step in (1, 2, 3):
        save(store, step)
    return store


def damages(path: Path, other: Path, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file: the new content, or `None` if it is gone."""
    content = path.read_bytes()
    for _ in range(24 if content else 0):
        flipped = bytearray(content)
        position = chance.randrange(len(content))
        flipped[position] ^= 1 << chance.randrange(8)
        yield f"bit flipped in byte {position}", bytes(flipped)
    for length in sorted({0, 1, len(content) // 2, len(content) - 1} - {len(content), -1}):
        yield f"cut to {length} bytes", content[:length]
    yield "removed", None
    yield "replaced by another step's", other.read_bytes()


def test_corruption_matrix(tmp_path, capsys):
    intact = three_steps(tmp_path / "intact").directory
    chance = random.Random(4)
    files = sorted(p for p in (intact / "3").rglob("*") if p.is_file())
    # Orbax gives its data files random names: the nth of one step for the nth of the other.
    others = sorted(p for p in (intact / "2").rglob("*") if p.is_file())
    assert len(files) == len(others)
    detected = harmless = 0
    for path, other in zip(files, others, strict=True):
        name = path.relative_to(intact)
        for what, content in damages(path, other, chance):
            broken = tmp_path / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(intact, broken)
            if content is None:
                (broken / name).unlink()
            else:
                (broken / name).write_bytes(content)
            found = CheckpointStore(broken).load_newest(["pytree"])
            assert found is not None, (name, what)
            step = found[0].step
            np.testing.assert_array_equal(found[1]["pytree"]["a"]["w"], array(step))
            np.testing.assert_array_equal(found[1]["pytree"]["a"]["b"], np.ones(5) * step)
            if step == 3:
                # It must be the very same, or say nothing (white space in the checksums).
                assert content == path.read_bytes() or path.name == CHECKSUMS_NAME, (name, what)
                harmless += 1
            else:
                assert step == 2, (name, what)
                (aside,) = (broken / "quarantine").iterdir()
                assert "damaged" in (aside / "why.txt").read_text()
                detected += 1
    with capsys.disabled():
        print(
            f"\ncorruption: {len(files)} files, {detected + harmless} damages, {detected} detected "
            f"and fallen back from, {harmless} without effect, 0 silently wrong",
            end=" ",
        )
    assert detected > 20 * len(files)
    assert harmless < 10


def test_every_checkpoint_damaged_is_an_error_that_names_each(tmp_path):
    store = three_steps(tmp_path)
    for step, damage in ((1, "resilient.json"), (2, CHECKSUMS_NAME), (3, "pytree/_METADATA")):
        (tmp_path / str(step) / damage).unlink()
    with pytest.raises(CheckpointNotFoundError) as caught:
        store.load_newest(["pytree"])
    for expected in (
        f"{tmp_path / '1'} is damaged. resilient.json: missing",
        f"{tmp_path / '2'} is damaged. {CHECKSUMS_NAME}: missing",
        f"{tmp_path / '3'} is damaged. pytree/_METADATA: missing",
    ):
        assert expected in str(caught.value)
    assert [c.step for c in store.checkpoints()] == [1, 2, 3]  # Nothing was moved.


def test_what_is_intact_but_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    store = three_steps(tmp_path)

    def load(*arguments):
        raise NotImplementedError("a format of the future")

    monkeypatch.setattr("resilient_ckpt.store.ocp.load_checkpointables", load)
    with pytest.raises(CheckpointUnreadableError, match=r"3 is intact, but.*format of the future"):
        store.load_newest(["pytree"])
    assert [c.step for c in store.checkpoints()] == [1, 2, 3]


def test_retention_does_not_count_on_what_was_not_verified(tmp_path):
    three_steps(tmp_path)
    # Another process; it has verified step 1 only.
    store = CheckpointStore(tmp_path, RetentionPolicy(1), "process")
    store.load(store.checkpoints()[0], ["pytree"])
    store.prune()
    assert [(c.step, c.root) for c in store.checkpoints()] == [
        (1, Root.RESUME),
        (2, Root.RESUME),
        (3, Root.PUBLIC),
    ]
    save(store, 4)
    assert [c.step for c in store.checkpoints()] == [3, 4]


def test_a_reading_error_that_passes_is_retried(tmp_path, monkeypatch):
    store = three_steps(tmp_path)
    store.retry = QUICK
    failures = [OSError(116, "Stale file handle"), TimeoutError()]

    def flaky(directory, required):
        if failures:
            raise failures.pop()
        return verify(directory, required)

    monkeypatch.setattr("resilient_ckpt.store.verify", flaky)
    found = store.load_newest(["pytree"])
    assert found is not None
    assert found[0].step == 3
    assert not (tmp_path / "quarantine").exists()


def test_verify_names_every_fault(tmp_path):
    three_steps(tmp_path)
    (tmp_path / "3" / "resilient.json").unlink()
    (tmp_path / "3" / "pytree" / "_METADATA").write_bytes(b"{}")
    with pytest.raises(CheckpointDamagedError) as caught:
        verify(tmp_path / "3")
    assert caught.value.faults["resilient.json"] == "missing"
    assert caught.value.faults["pytree/_METADATA"].startswith("2 bytes instead of")


@pytest.mark.parametrize("path", ["../../escaped", "/tmp/escaped", "pytree/../../escaped"])
def test_checksums_name_nothing_outside_their_checkpoint(path):
    content = {"format": 1, "algorithm": "xxh3_128", "files": {path: {"bytes": 1, "digest": "0"}}}
    text = json.dumps({**content, "digest": integrity._digest_of(content)})
    with pytest.raises(CheckpointDamagedError, match="is not within the checkpoint"):
        parse_checksums(text.encode(), "somewhere")


def test_a_damaged_record_is_not_deleted_but_set_aside(tmp_path):
    store = three_steps(tmp_path)
    (tmp_path / "1" / "resilient.json").write_text("{")
    store.retention = RetentionPolicy(1)
    save(store, 4)
    assert (tmp_path / "1").exists()
    store.load_newest(["pytree"])
    assert [path.name.split("-")[0] for path in (tmp_path / "quarantine").iterdir()] == ["1"]


# Real system calls that fail.

PROGRAM = """
import logging, sys
import numpy as np
from test_storage import QUICK, save
from resilient_ckpt import CheckpointStore, RetryPolicy, RetentionPolicy
logging.basicConfig(level="WARNING")
store = CheckpointStore(sys.argv[1], RetentionPolicy(1), retry=RetryPolicy(30, 0.01, 0.1))
store.create()
for step in map(int, sys.argv[2:]):
    save(store, step)
"""


def run_with_faults(directory: Path, fault: str, *steps: int) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={fault}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", PROGRAM, str(directory), *map(str, steps)]
    return subprocess.run([*command, *program], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not has_strace(), reason="strace is not installed")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("fsync:error=EIO:when=5..7", "Input/output error"),
        ("fsync:error=EIO:when=25", "Input/output error"),
        ("writev:error=EIO:when=3", "Input/output error"),
        ("writev:error=ESTALE:when=12", "Stale file handle"),
        ("rename:error=EIO:when=4..5", "Input/output error"),
        ("fsync:error=ENOSPC:when=50", "the disk is full"),
    ],
)
def test_system_calls_that_fail_for_a_while(tmp_path, fault, says):
    # strace counts for each thread.
    done = run_with_faults(tmp_path, fault, 1, 2, 3, 4)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    store = CheckpointStore(tmp_path)
    assert [c.step for c in store.checkpoints()][-1] == 4
    for checkpoint in store.checkpoints():
        assert verify(checkpoint.path)
        np.testing.assert_array_equal(
            store.load(checkpoint, ["pytree"])["pytree"]["a"]["w"], array(checkpoint.step)
        )
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith((".saving", ".deleting"))]


@pytest.mark.skipif(not has_strace(), reason="strace is not installed")
def test_system_calls_that_are_forbidden_fail_at_once(tmp_path):
    three_steps(tmp_path)
    done = run_with_faults(tmp_path, "writev:error=EACCES", 4)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "failed (attempt" not in done.stderr
    store = CheckpointStore(tmp_path)
    assert [c.step for c in store.checkpoints()] == [1, 2, 3]
    assert all(verify(checkpoint.path) for checkpoint in store.checkpoints())


# A whole run.


class At(keras.callbacks.Callback):
    """Does something after a batch."""

    def __init__(self, **actions) -> None:
        super().__init__()
        self.actions, self.seen = {int(k[1:]): v for k, v in actions.items()}, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen in self.actions:
            self.actions[self.seen]()


def fit(directory, *callbacks, epochs=2, **options):
    restart()
    keras.utils.set_random_seed(5)
    model = small_model()
    x, y = numbers()
    options = {"save_freq": 1, "retry": QUICK, "max_to_keep": None, **options}
    checkpoint = ResilientCheckpoint(directory, **options)
    for callback in callbacks:
        callback.checkpoint = checkpoint
    history = model.fit(
        x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[*callbacks, checkpoint]
    )
    return history, checkpoint


def steps(directory) -> list[int]:
    return [c.step for c in CheckpointStore(directory).checkpoints()]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and how to mount it again with other options."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    point = tmp_path / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(point)], check=True)

    try:
        yield point, remount
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fills_up(small_disk, background, caplog):
    point, _ = small_disk
    filler = point / "somebody else's"

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(4096))

    action = At(_4=fill, _8=lambda: filler.unlink())
    history, checkpoint = fit(point / "run", action, save_on_background=background)
    assert history.epoch == [0, 1]
    assert checkpoint.failed_saves >= 1
    assert "No space left on device" in caplog.text
    found = steps(point / "run")
    assert {1, 2, 10} <= set(found)
    assert len(found) <= 10 - checkpoint.failed_saves
    assert all(verify(c.path) for c in CheckpointStore(point / "run").checkpoints())


def test_a_full_disk_is_made_room_on(small_disk, caplog):
    """There is room for the newest and one under way, but not for one to fall back on."""
    point, remount = small_disk
    fit(point / "try", epochs=1, max_to_keep=1)
    used = sum(p.stat().st_blocks * 512 for p in (point / "try").rglob("*"))
    shutil.rmtree(point / "try")
    remount(f"size={int(used * 1.4) // 1024}k")
    _, checkpoint = fit(point / "run", max_to_keep=1, save_on_background=False)
    # Threads of Orbax may still be filling the disk after an attempt has failed.
    assert caplog.text.count("trying again with the room made") > checkpoint.failed_saves
    assert steps(point / "run")[-1] == 10


def test_a_disk_that_is_full_at_the_end(small_disk):
    point, _ = small_disk

    def fill():
        with contextlib.suppress(OSError), open(point / "filler", "wb") as file:
            while True:
                file.write(bytes(512))

    with pytest.raises(SaveFailedError, match=r"No space left.*newest good checkpoint is step"):
        fit(point / "run", At(_7=fill), save_on_background=False)
    assert len(steps(point / "run")) >= 6


def test_a_disk_that_turns_read_only(small_disk):
    point, remount = small_disk
    action = At(_3=lambda: remount("ro"), _7=lambda: remount("rw"))
    history, checkpoint = fit(point / "run", action, save_on_background=False)
    assert history.epoch == [0, 1]
    assert checkpoint.failed_saves == 4
    assert steps(point / "run") == [1, 2, 7, 8, 9, 10]


def test_a_disk_that_stays_read_only(small_disk):
    point, remount = small_disk
    with pytest.raises(SaveFailedError, match=r"Read-only file system.*checkpoint is step 5 "):
        fit(point / "run", At(_6=lambda: remount("ro")), save_on_background=False)
    assert steps(point / "run") == [1, 2, 3, 4, 5]
    remount("rw")
    history, _ = fit(point / "run")
    assert history.epoch == [0, 1]


def test_permission_is_lost(tmp_path):
    run = tmp_path / "run"
    root = os.geteuid() == 0
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)

    def lose():
        run.chmod(0o555)
        if root:
            os.seteuid(65534)

    def regain():
        if root:
            os.seteuid(0)
        run.chmod(0o755)

    try:
        history, checkpoint = fit(run, At(_4=lose, _6=regain), save_on_background=False)
    finally:
        regain()
    assert history.epoch == [0, 1]
    assert checkpoint.failed_saves == 2
    assert steps(run) == [1, 2, 3, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("background", [True, False])
def test_the_directory_is_deleted_underneath(tmp_path, background, caplog):
    run = tmp_path / "run"
    deleted = At(_6=lambda: shutil.rmtree(run, ignore_errors=True))
    history, checkpoint = fit(run, deleted, save_on_background=background)
    assert history.epoch == [0, 1]
    assert steps(run)[-1] == 10
    assert checkpoint.latest_step == 10
    assert "had vanished" in caplog.text
    again, _ = fit(run)
    assert again.history == history.history


def test_another_process_takes_the_directory_over(tmp_path):
    """What this process must not do after it stood still for too long."""

    def take_over():
        (tmp_path / LOCK_NAME).write_text('{"host": "elsewhere", "pid": 1, "token": "theirs"}')

    with pytest.raises(DirectoryInUseError, match="process 1 on elsewhere, which took over"):
        fit(tmp_path, At(_4=take_over), save_on_background=False)
    assert steps(tmp_path) == [1, 2, 3]
    assert "theirs" in (tmp_path / LOCK_NAME).read_text()


# A save that hangs: its process is stopped, as it would be by a file server that is gone.


def writers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "writer_process" in " ".join(child.cmdline())
    ]


class StopWriter(keras.callbacks.Callback):
    """Stops the process that writes, when it has nothing to do, after a batch."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.seen, self.at = step, 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            self.checkpoint.wait_until_finished()
            for process in writers():
                process.suspend()
            self.at = time.monotonic()


def test_a_save_that_hangs_is_given_up(tmp_path, caplog):
    stop = StopWriter(5)
    history, checkpoint = fit(tmp_path, stop, save_freq=2, save_timeout_seconds=8.0)
    assert history.epoch == [0, 1]
    assert checkpoint.failed_saves == 1
    assert "Saving step 6 failed" in caplog.text
    assert "longer than save_timeout_seconds (8 s)" in caplog.text
    assert steps(tmp_path) == [2, 4, 8, 10]
    assert writers() == []


def test_a_last_save_that_hangs_is_an_error(tmp_path):
    stop = StopWriter(9)
    with pytest.raises(SaveFailedError, match=r"TimeoutError.*newest good checkpoint is step 8"):
        fit(tmp_path, stop, save_freq=4, save_timeout_seconds=8.0)
    assert writers() == []


def test_the_emergency_save_does_not_queue_behind_one_that_hangs(tmp_path, caplog):
    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    # 6 is being saved, by a process that is stopped, when the notice comes; ten seconds are left.
    stop = StopWriter(5)
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, stop, At(_7=terminate), save_freq=2, grace_seconds=10)
    assert caught.value.code == 143
    assert time.monotonic() - stop.at < 10
    assert steps(tmp_path)[-1] == 7
    assert "does not wait for it" in caplog.text
    history, _ = fit(tmp_path)
    assert history.epoch == [0, 1]


def test_a_notice_ends_waiting_for_a_save_that_hangs(tmp_path):
    # The loop waits for 6, to save 8, when the notice comes.
    stop = StopWriter(5)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(tmp_path, stop, At(_8=timer.start), save_freq=2, grace_seconds=10)
    assert time.monotonic() - stop.at < 13
    assert steps(tmp_path)[-1] == 8
