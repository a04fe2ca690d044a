"""The mirror: a real S3 server over HTTP, with a network that fails in between."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from exact import numbers, restart, small_model
from processes import finish, moment, newest, start
from resilient_ckpt.chaos.http_faults import FaultProxy, HttpFaults
from resilient_ckpt.chaos.s3 import S3Server, client_environment, find_rclone
from test_storage import array, save, three_steps

from resilient_ckpt import (
    CheckpointNotFoundError,
    CheckpointsExistError,
    CheckpointStore,
    ResilientCheckpoint,
    RetentionPolicy,
    RetryPolicy,
    SaveFailedError,
)
from resilient_ckpt.mirror import JOURNAL_PREFIX, Mirror
from resilient_ckpt.uploads import Uploads

QUICK = RetryPolicy(budget_seconds=0.5, first_wait_seconds=0.01)
PATIENT = RetryPolicy(budget_seconds=60, first_wait_seconds=0.02, max_wait_seconds=0.5)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    pytest.importorskip("s3fs")
    if find_rclone() is None:
        pytest.skip("rclone is not installed")
    directory = tmp_path_factory.mktemp("s3")
    with S3Server(directory) as server:
        yield server


@pytest.fixture
def network(s3, monkeypatch, request):
    """A network to a new bucket, and how to make it fail."""
    bucket = f"bucket{abs(hash(request.node.nodeid)) % 10**8}"
    (s3.directory / bucket).mkdir()
    with FaultProxy(s3.port, HttpFaults(), seed=3) as proxy:
        for name, value in client_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # of botocore's own; the rest is ours
        proxy.url = f"s3://{bucket}/run"
        proxy.folder = s3.directory / bucket / "run"
        yield proxy


class At(keras.callbacks.Callback):
    """Does something after a batch."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action, self.seen = step, action, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            self.action()


def fail():
    raise RuntimeError("made to fail")


def fit(directory, *callbacks, epochs=2, **options):
    restart()
    keras.utils.set_random_seed(5)
    model = small_model()
    x, y = numbers()
    options = {"save_on_background": False, "durability": "process", **options}
    checkpoint = ResilientCheckpoint(directory, **options)
    history = model.fit(
        x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[*callbacks, checkpoint]
    )
    return [np.array(w) for w in model.get_weights()], history.history, checkpoint


def same(ours, theirs):
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_new_machine_continues_from_the_bucket(tmp_path, network):
    undisturbed = fit(tmp_path / "undisturbed", epochs=3)
    with pytest.raises(RuntimeError, match="made to fail"):
        fit(tmp_path / "old", At(8, fail), epochs=3, save_freq=2, mirror=network.url)
    # The folder is what plain Keras reads, once it is copied.
    assert (network.folder / "8" / "checksums.json").exists()
    ran = At(100, fail)
    resumed = fit(tmp_path / "new", ran, epochs=3, save_freq=2, mirror=network.url)
    same(resumed, undisturbed)
    assert ran.seen == 7
    mirrored = Mirror(network.url).checkpoints()
    assert [c.step for c in mirrored][-1] == 15
    shutil.copytree(network.folder, tmp_path / "copy")
    model = small_model()
    model.load_weights(tmp_path / "copy")
    for a, b in zip(model.get_weights(), undisturbed[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_sigterm_on_one_machine_resume_on_another(tmp_path, network):
    undisturbed = finish(tmp_path / "plain", "--plain")
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.3)
    with start(tmp_path / "old", *slow, save_freq=1000, mirror=network.url) as process:
        process.wait_for_line(moment("batch_end", step=7))
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
    assert newest(tmp_path / "old").step == 7
    assert finish(tmp_path / "new", save_freq="epoch", mirror=network.url) == undisturbed


FAULTS = {
    "answers 500, 503, 429": HttpFaults(errors=0.3),
    "connections reset in the middle": HttpFaults(resets=0.3),
    "bodies cut short": HttpFaults(truncations=0.3),
    "everything, and slow": HttpFaults(errors=0.1, resets=0.1, truncations=0.1, seconds=0.05),
    "throttled": HttpFaults(errors=0.5, statuses=(429, 503)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_over_a_bad_network_loses_nothing(tmp_path, network, name, capsys):
    undisturbed = fit(tmp_path / "undisturbed")
    network.faults = FAULTS[name]
    began = time.monotonic()
    options = {"mirror": network.url, "retry": PATIENT, "save_freq": 4}
    same(fit(tmp_path / "old", **options), undisturbed)
    # Another machine, over the same network: the finished run is fetched, and is finished.
    again = fit(tmp_path / "new", **options)
    taken = time.monotonic() - began
    same(again, undisturbed)
    broken = sum(network.counts.values()) - network.counts["passed"]
    assert broken > 0.1 * sum(network.counts.values())
    with capsys.disabled():
        print(
            f"\n{name}: {broken} of {sum(network.counts.values())} failed, {taken:.1f} s", end=" "
        )


def test_an_outage_in_the_middle_of_a_run(tmp_path, network, caplog):
    undisturbed = fit(tmp_path / "undisturbed")

    def set_outage(value):
        return lambda: setattr(network, "faults", HttpFaults(outage=value))

    def wait_for_requests():
        end = time.monotonic() + 30
        while not network.counts["outage"] and time.monotonic() < end:
            time.sleep(0.05)

    callbacks = [At(1, set_outage(True)), At(7, wait_for_requests), At(8, set_outage(False))]
    done = fit(tmp_path / "run", *callbacks, mirror=network.url, retry=PATIENT, save_freq=2)
    same(done, undisturbed)
    assert network.counts["outage"] > 0
    assert [c.step for c in Mirror(network.url).checkpoints()][-1] == 10


def test_an_outage_at_the_end_is_an_error_that_says_what_is_safe(tmp_path, network):
    def cut():
        network.faults = HttpFaults(outage=True)

    with pytest.raises(SaveFailedError, match=r"could not be mirrored.*good checkpoint is step 10"):
        fit(tmp_path, At(7, cut), mirror=network.url, retry=QUICK, save_freq=4)
    network.faults = HttpFaults()
    # Started again, it is finished, and mirrored.
    fit(tmp_path, mirror=network.url, retry=QUICK, save_freq=4)
    assert [c.step for c in Mirror(network.url).checkpoints()][-1] == 10


def test_an_outage_at_the_start(tmp_path, network, caplog):
    with pytest.raises(RuntimeError, match="made to fail"):
        fit(tmp_path / "run", At(6, fail), mirror=network.url, retry=QUICK)
    network.faults = HttpFaults(outage=True)
    # Where nothing is known of the run, it must not begin anew.
    ran = At(1, fail)
    with pytest.raises(Exception, match=r"(?i)connect|closed|endpoint"):
        fit(tmp_path / "new", ran, mirror=network.url, retry=QUICK)
    assert ran.seen == 0
    # Where it is known, it goes on.
    heal = At(2, lambda: setattr(network, "faults", HttpFaults()))
    fit(tmp_path / "run", heal, mirror=network.url, retry=QUICK)
    assert heal.seen == 4
    assert "cannot be read; continuing" in caplog.text


def test_a_bucket_that_is_not_there_fails_at_once(tmp_path, network):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        fit(tmp_path, mirror="s3://not-there/run")
    assert time.monotonic() - began < 15


def test_wrong_credentials_fail_at_once_and_are_not_logged(tmp_path, network, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with caplog.at_level(logging.DEBUG, "resilient_ckpt"), pytest.raises(PermissionError):
        fit(tmp_path, mirror=network.url)
    assert "wrong-secret" not in caplog.text


UPLOAD = """
import sys
from pathlib import Path
from resilient_ckpt.mirror import Mirror
directory = Path(sys.argv[2])
Mirror(sys.argv[1]).upload(directory, directory / "3")
"""


def test_an_upload_killed_in_the_middle_is_continued(tmp_path, network):
    three_steps(tmp_path)
    network.faults = HttpFaults(seconds=1.0)
    journal = tmp_path / f"{JOURNAL_PREFIX}3"
    command = [sys.executable, "-c", UPLOAD, network.url, str(tmp_path)]
    with subprocess.Popen(command) as process:
        while not journal.exists() or len(journal.read_text().splitlines()) < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    network.faults = HttpFaults()
    mirror = Mirror(network.url)
    assert mirror.checkpoints() == []  # What is half there does not count.
    done = mirror.upload(tmp_path, tmp_path / "3")
    assert done is not None
    assert done.skipped >= 3
    files = [path for path in (tmp_path / "3").rglob("*") if path.is_file()]
    assert done.files + done.skipped == len(files) - 1  # all but the checksums
    (found,) = mirror.checkpoints()
    mirror.fetch(found, tmp_path / "fetched")
    for path in files:
        assert (tmp_path / "fetched" / path.relative_to(tmp_path / "3")).read_bytes() == (
            path.read_bytes()
        )
    assert not journal.exists()


def test_the_note_of_an_upload_may_itself_be_cut_short(tmp_path, folder):
    store = three_steps(tmp_path / "run")
    mirror = Mirror(str(folder))
    journal = store.directory / f"{JOURNAL_PREFIX}3"
    stale = store.directory / f"{JOURNAL_PREFIX}resume-2"
    stale.write_text("")
    for content in ("", "abc", "abc\npytree/_META", f"{'0' * 64}\npytree/_METADATA\n"):
        journal.write_text(content)
        shutil.rmtree(folder, ignore_errors=True)
        done = mirror.upload(store.directory, store.directory / "3")
        assert done is not None
        assert done.skipped == 0
        assert not journal.exists()
    assert not stale.exists()
    (folder / "3" / "resilient.json").unlink()
    assert "damaged" in mirror.checkpoints()[0].record


def test_half_an_upload_of_a_lost_machine_is_cleared(tmp_path, network):
    three_steps(tmp_path)
    mirror = Mirror(network.url)
    mirror.upload(tmp_path, tmp_path / "2")
    mirror.upload(tmp_path, tmp_path / "3")
    (network.folder / "3" / "checksums.json").unlink()
    assert [c.step for c in mirror.checkpoints()] == [2]
    mirror.prune()
    assert sorted(p.name for p in network.folder.iterdir()) == ["2"]


def test_what_the_bucket_has_damaged_is_set_aside(tmp_path, network, caplog):
    fit(tmp_path / "old", mirror=network.url, epochs=1)
    with pytest.raises(RuntimeError, match="made to fail"):
        fit(tmp_path / "old", At(3, fail), mirror=network.url)
    assert sorted(c.step for c in Mirror(network.url).checkpoints()) == [5, 8]
    array_file = max((network.folder / "8").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(array_file.read_bytes())
    content[len(content) // 2] ^= 1
    array_file.write_bytes(content)
    ran = At(100, fail)
    fit(tmp_path / "new", ran, mirror=network.url, retry=QUICK)
    assert ran.seen == 5
    assert "8 is damaged" in caplog.text
    (aside,) = (network.folder / "quarantine").iterdir()
    assert aside.name.startswith("8-")
    assert "damaged" in (aside / "why.txt").read_text()


def test_a_url_as_the_directory(tmp_path, network, monkeypatch):
    undisturbed = fit(tmp_path / "undisturbed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "old machine"))
    with pytest.raises(RuntimeError):
        fit(network.url, At(7, fail))
    assert [c.step for c in Mirror(network.url).checkpoints()][-1] == 7
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new machine"))
    ran = At(100, fail)
    same(fit(network.url, ran), undisturbed)
    assert ran.seen == 3
    with pytest.raises(ValueError, match=r"`directory`='s3:.*another `mirror`"):
        ResilientCheckpoint(network.url, mirror=str(tmp_path))


@pytest.fixture
def gcs(monkeypatch):
    """Google's storage, as far as its emulator goes."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    # Else it asks a service that the emulator has not about the kind of bucket.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield "gs://bucket/run"
    server.stop()


GCS_RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from test_mirror import At, fail, fit
weights, history, _ = fit(sys.argv[1], *([At(7, fail)] if sys.argv[3] == "fail" else []))
print(history, sum(w.sum() for w in weights))
"""


def test_google_storage_as_the_directory(tmp_path, gcs):
    def run(directory: str, cache: str, what: str = "") -> str:
        # fsspec reads its environment when it is imported.
        command = [sys.executable, "-c", GCS_RUN, directory, str(Path(__file__).parent), what]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / cache)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ("made to fail" in done.stderr) == (what == "fail"), done.stderr
        return done.stdout.splitlines()[-1] if done.stdout else done.stderr

    undisturbed = run(str(tmp_path / "undisturbed"), "none")
    run(gcs, "old machine", "fail")
    assert run(gcs, "new machine") == undisturbed
    (fetched,) = (tmp_path / "new machine" / "resilient-ckpt").iterdir()
    assert sorted(p.name for p in fetched.iterdir()) == ["10", "resume"]
    assert [p.name for p in (fetched / "resume").iterdir()] == ["7"]


# What does not need S3.


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mirror"


def test_a_newer_local_checkpoint_goes_before_the_mirror_s(tmp_path, folder):
    with pytest.raises(RuntimeError):
        fit(tmp_path / "run", At(4, fail), mirror=str(folder))
    with pytest.raises(RuntimeError):
        fit(tmp_path / "run", At(3, fail))  # 7 in all, not mirrored
    ran = At(100, fail)
    fit(tmp_path / "run", ran, mirror=f"file://{folder}")
    assert ran.seen == 3


def test_an_older_local_checkpoint_comes_after_the_mirror_s(tmp_path, folder):
    with pytest.raises(RuntimeError):
        fit(tmp_path / "run", At(4, fail), mirror=str(folder))
    shutil.copytree(tmp_path / "run", tmp_path / "stale")
    with pytest.raises(RuntimeError):
        fit(tmp_path / "run", At(3, fail), mirror=str(folder))
    ran = At(100, fail)
    fit(tmp_path / "stale", ran, mirror=str(folder))
    assert ran.seen == 3


def test_all_local_checkpoints_damaged_the_mirror_s_is_taken(tmp_path, folder):
    with pytest.raises(RuntimeError):
        fit(tmp_path / "run", At(7, fail), mirror=str(folder), save_freq=3)
    for path in (tmp_path / "run").rglob("_METADATA"):
        path.write_bytes(b"garbage")
    ran = At(100, fail)
    fit(tmp_path / "run", ran, mirror=str(folder), save_freq=3)
    assert ran.seen == 3
    assert (tmp_path / "run" / "quarantine").exists()


def test_another_run_s_mirror_is_refused(tmp_path, folder):
    fit(tmp_path / "one", mirror=str(folder))
    fit(tmp_path / "two", epochs=1)
    with pytest.raises(CheckpointsExistError, match="another run"):
        fit(tmp_path / "two", mirror=str(folder))
    with pytest.raises(CheckpointsExistError, match=r'resume="never"'):
        fit(tmp_path / "three", mirror=str(folder), resume="never")


def test_back_to_a_step_that_only_the_mirror_has(tmp_path, folder):
    keep = {"max_to_keep": None, "save_freq": 2}
    whole = fit(tmp_path / "run", mirror=str(folder), **keep)
    ran = At(100, fail)
    again = fit(tmp_path / "new", ran, mirror=str(folder), resume=4, **keep)
    assert ran.seen == 6
    same(again, whole)
    aside = {p.name.split("-")[0] for p in (folder / "quarantine").iterdir()}
    assert aside == {"6", "8", "10"}
    with pytest.raises(CheckpointNotFoundError, match="resume=5"):
        fit(tmp_path / "newer", mirror=str(folder), resume=5)
    # A third machine goes on with what was done after going back.
    ran = At(100, fail)
    fit(tmp_path / "third", ran, mirror=str(folder), resume=4, epochs=3, **keep)
    assert ran.seen == 5


def test_own_retention(tmp_path, folder):
    mirror = Mirror(str(folder), RetentionPolicy(max_to_keep=3))
    fit(tmp_path / "run", mirror=mirror, save_freq=1, epochs=1)
    assert len(mirror.checkpoints()) <= 4
    assert [c.step for c in mirror.checkpoints()][-1] == 5
    assert [c.step for c in CheckpointStore(tmp_path / "run").checkpoints()] == [4, 5]


def test_best_ones_are_mirrored_too(tmp_path, folder):
    options = {"monitor": "loss", "mode": "max", "keep_best": 1, "mirror": str(folder)}
    fit(tmp_path / "run", epochs=4, **options)
    local = {c.step for c in CheckpointStore(tmp_path / "run").checkpoints()}
    assert len(local) >= 2
    assert {c.step for c in Mirror(str(folder)).checkpoints()} == local


def test_a_step_saved_anew_is_uploaded_anew(tmp_path, folder):
    store = three_steps(tmp_path / "run")
    mirror = Mirror(str(folder))
    mirror.upload(store.directory, store.directory / "3")
    before = {p for p in folder.rglob("*") if p.is_file()}
    save(store, 3)
    assert mirror.upload(store.directory, store.directory / "3") is not None
    assert mirror.upload(store.directory, store.directory / "3") is None
    (found,) = mirror.checkpoints()
    mirror.fetch(found, tmp_path / "fetched")
    after = {p for p in folder.rglob("*") if p.is_file()}
    # Orbax' data files have random names; those of the first time are gone.
    assert len(after) == len(before)


def test_a_slow_mirror_is_behind_but_never_far(tmp_path, network):
    store = CheckpointStore(tmp_path, RetentionPolicy(1), "process")
    uploads = Uploads(Mirror(network.url), store)
    network.faults = HttpFaults(seconds=0.2)
    try:
        for step in (1, 2, 3, 4, 5):
            save(store, step)
            uploads.submit([c for c in store.checkpoints() if c.step == step])
            time.sleep(0.3)
        assert store.pinned
        assert all(path.is_dir() for path in store.pinned)
        assert uploads.wait(60)
        assert uploads.failed == 0
        assert uploads.uploaded is not None
        assert uploads.uploaded.step == 5
        assert store.pinned == set()
        steps = [c.step for c in Mirror(network.url).checkpoints()]
        assert steps[-1] == 5
        assert 2 not in steps or 3 not in steps or 4 not in steps
    finally:
        uploads.close()


def test_an_emergency_breaks_off_what_is_being_uploaded(tmp_path, network):
    store = CheckpointStore(tmp_path, RetentionPolicy(None), "process")
    uploads = Uploads(Mirror(network.url), store)
    network.faults = HttpFaults(seconds=3.0)
    try:
        save(store, 1)
        uploads.submit(store.checkpoints())
        while network.counts["passed"] < 2:
            time.sleep(0.05)
        save(store, 2)
        network.faults = HttpFaults()
        uploads.submit_first(store.checkpoints()[-1])
        assert uploads.wait(20)
        assert uploads.failed == 0
        assert [c.step for c in Mirror(network.url).checkpoints()] == [2]
    finally:
        uploads.close()


def test_a_grace_period_too_short_for_the_mirror(tmp_path, network, caplog):
    undisturbed = fit(tmp_path / "undisturbed")

    def terminate():
        network.faults = HttpFaults(seconds=20.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    began = time.monotonic()
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", At(7, terminate), mirror=network.url, grace_seconds=5)
    assert time.monotonic() - began < 12
    assert "too short for the mirror" in caplog.text
    assert newest(tmp_path / "run").step == 7
    network.faults = HttpFaults()
    # The next process on this disk finishes the upload, and the run.
    same(fit(tmp_path / "run", mirror=network.url), undisturbed)
    assert 10 in [c.step for c in Mirror(network.url).checkpoints()]


def test_a_notice_while_the_end_waits_for_the_mirror(tmp_path, network):
    undisturbed = fit(tmp_path / "undisturbed")

    def slow_down():
        network.faults = HttpFaults(seconds=30.0)
        threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    began = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path / "run", At(10, slow_down), mirror=network.url, grace_seconds=4)
    assert caught.value.code == 143
    assert time.monotonic() - began < 15
    network.faults = HttpFaults()
    same(fit(tmp_path / "run", mirror=network.url), undisturbed)
    assert 10 in [c.step for c in Mirror(network.url).checkpoints()]


def test_what_has_no_checksums_is_not_mirrored(tmp_path, folder, caplog):
    restart()
    model = small_model()
    x, y = numbers()
    theirs = keras.callbacks.OrbaxCheckpoint(tmp_path / "run", save_freq="epoch")
    model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[theirs])
    fit(tmp_path / "run", epochs=2, mirror=str(folder))
    assert [c.step for c in Mirror(str(folder)).checkpoints()] == [10]
    assert "carries no checksums, and is not mirrored" in caplog.text


@pytest.mark.parametrize(
    ("mirror", "error", "says"),
    [
        (3, TypeError, "`mirror`.*3"),
        ("", TypeError, "`mirror`.*''"),
        ("nothing://bucket/run", ValueError, "`mirror`='nothing://bucket/run'"),
        ("s3://key:secret@bucket/run", ValueError, "must not hold credentials"),
    ],
)
def test_bad_mirrors(tmp_path, mirror, error, says):
    with pytest.raises(error, match=says) as caught:
        ResilientCheckpoint(tmp_path, mirror=mirror)
    assert "secret@" not in str(caught.value)


def test_arrays_survive_the_round_trip(tmp_path, folder):
    store = three_steps(tmp_path / "run")
    mirror = Mirror(str(folder))
    mirror.upload(store.directory, store.directory / "3")
    other = CheckpointStore(tmp_path / "other", durability="process")
    (found,) = mirror.checkpoints()
    other.adopt(lambda target: mirror.fetch(found, target), found.root, found.step)
    loaded = other.load_newest(["pytree"])
    assert loaded is not None
    np.testing.assert_array_equal(loaded[1]["pytree"]["a"]["w"], array(3))
