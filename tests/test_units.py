"""The parts that work without Keras."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilient_ckpt.signals import NoticeKind, NoticeListener, SignalSource

from resilient_ckpt import codec, rng
from resilient_ckpt.child import Child, ChildDiedError
from resilient_ckpt.errors import DirectoryInUseError
from resilient_ckpt.lock import LOCK_NAME, STALE_SECONDS, DirectoryLock
from resilient_ckpt.policy import AllOf, EpochEnd, EveryBatches, EverySeconds, Progress, policy_from
from resilient_ckpt.record import Checkpoint, Root
from resilient_ckpt.retention import RetentionPolicy
from resilient_ckpt.retry import RetryPolicy, is_out_of_space, is_transient
from resilient_ckpt.snapshot import HostBlock
from resilient_ckpt.store import CheckpointStore, SaveJob, Target

# Policies.


def saved_at(policy, moments):
    policy.start(moments[0])
    saved = []
    for moment in moments:
        if policy.due(moment):
            policy.saved(moment)
            saved.append(moment.step)
    return saved


def moments(count=20, per_epoch=5, seconds=1.0):
    return [
        Progress(step, step // per_epoch, step % per_epoch, step * seconds, step % per_epoch == 0)
        for step in range(count + 1)
    ]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (EveryBatches(7), [7, 14]),
        (EpochEnd(), [0, 5, 10, 15, 20]),
        (EpochEnd(2), [0, 10, 20]),
        (EverySeconds(6), [6, 12, 18]),
        (EverySeconds(datetime.timedelta(seconds=6)), [6, 12, 18]),
        (EveryBatches(3) & EpochEnd(), [5, 10, 15, 20]),
        (EveryBatches(7) | EverySeconds(5), [5, 10, 15, 20]),
        (policy_from(9), [9, 18]),
        (policy_from("epoch"), [0, 5, 10, 15, 20]),
    ],
)
def test_policies(policy, steps):
    assert saved_at(policy, moments()) == steps


def test_policies_remember_over_a_restart():
    first = EveryBatches(4) | EpochEnd()
    first.saved(Progress(10, 0, 0, 0.0))
    second = EveryBatches(4) | EpochEnd()
    second.set_state(json.loads(json.dumps(first.get_state())))
    second.start(Progress(12, 0, 0, 0.0))
    assert not second.due(Progress(13, 0, 0, 0.0))
    assert second.due(Progress(14, 0, 0, 0.0))


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "x"])
def test_bad_policies(bad):
    with pytest.raises(ValueError, match="`batches`"):
        EveryBatches(bad)
    with pytest.raises(TypeError, match="SavePolicy"):
        AllOf(EpochEnd(), bad)


# Retention.

checkpoints = st.lists(
    st.builds(
        lambda step, root, finite, resumable, metric: Checkpoint(
            step,
            root,
            Path(f"{root.value}/{step}"),
            {"finite": finite, "resumable": resumable, "metric": metric},
        ),
        st.integers(1, 30),
        st.sampled_from(Root),
        st.booleans(),
        st.booleans(),
        st.none() | st.floats(-5, 5),
    ),
    unique_by=lambda checkpoint: checkpoint.path,
)


@given(
    checkpoints,
    st.none() | st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(["min", "max"]),
    st.integers(0, 2),
    st.data(),
)
def test_retention(found, max_to_keep, keep_best, mode, fallbacks, data):
    paths = [c.path for c in found]
    verified = data.draw(st.sets(st.sampled_from(paths))) if paths else set()
    pinned = data.draw(st.sets(st.sampled_from(paths))) if paths else set()
    policy = RetentionPolicy(max_to_keep, keep_best, mode)
    sweep = policy.sweep(found, verified, pinned, fallbacks)
    kept = [checkpoint for checkpoint in found if checkpoint not in sweep.delete]
    good = [c for c in found if c.finite]
    to_resume = sorted((c for c in good if c.resumable), key=lambda c: c.order)
    assert set(to_resume[-1 - fallbacks :]) <= set(kept)
    known_good = [c for c in to_resume if c.path in verified]
    assert set(known_good[-1:]) <= set(kept)
    in_place = [c for c in kept if c not in sweep.set_back]
    assert {c for c in found if c.path in pinned} <= set(in_place)
    public = sorted((c for c in good if c.root is Root.PUBLIC), key=lambda c: c.order)
    assert set(public if max_to_keep is None else public[-max_to_keep:]) <= set(in_place)
    measured = [c.metric for c in public if c.metric is not None]
    best = sorted(measured, reverse=mode == "max")[:keep_best]
    kept_metrics = [c.metric for c in in_place if c.root is Root.PUBLIC and c.finite]
    for value in best:
        assert value in kept_metrics
    assert all(c.root is Root.PUBLIC for c in sweep.set_back)
    # What is kept stays kept: deciding again deletes nothing more.
    assert policy.sweep(kept, verified, pinned, fallbacks).delete == ()


# The codec.

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([np.float32(1.5), np.int64(-3), np.bool_(True)]),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.just("__rc__"), inner)
    ),
)


@given(values)
def test_codec_gives_back_what_it_got(value):
    arrays: list[np.ndarray] = []
    text = json.dumps(codec.encode(value, arrays))
    back = codec.decode(json.loads(text), arrays)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("dtype", ["float32", "int8", "bool", "float64", "bfloat16"])
def test_codec_arrays(size, dtype):
    import ml_dtypes

    array = np.arange(size).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arrays: list[np.ndarray] = []
    back = codec.decode(json.loads(json.dumps(codec.encode({"a": array}, arrays))), arrays)["a"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    assert len(arrays) == (1 if array.nbytes > codec.INLINE_BYTES else 0)


def test_codec_random_generators():
    for make in (np.random.default_rng, np.random.RandomState, random.Random):
        generator = make(4)
        generator.random()
        back = codec.decode(json.loads(json.dumps(codec.encode(generator))))
        assert [back.random() for _ in range(3)] == [generator.random() for _ in range(3)]


def test_codec_refuses_what_it_cannot_hold():
    with pytest.raises(codec.NotEncodableError, match=r"threading\.Event"):
        codec.encode({"a": [threading.Event()]})
    with pytest.raises(ValueError, match="Unknown kind"):
        codec.decode({"__rc__": "pickle"})


def test_random_states():
    states = json.loads(json.dumps(rng.capture()))
    drawn = [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()]
    rng.restore(states)
    assert [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()] == drawn


# Retries.


@pytest.mark.parametrize(
    ("number", "transient"),
    [
        (errno.EIO, True),
        (errno.ESTALE, True),
        (errno.ETIMEDOUT, True),
        (errno.ENOSPC, False),
        (errno.EACCES, False),
        (errno.EROFS, False),
        (errno.EDQUOT, False),
    ],
)
def test_errors_are_judged_by_their_cause(number, transient):
    error = ValueError("wrapped")
    error.__cause__ = OSError(number, os.strerror(number))
    assert is_transient(error) is transient
    assert not is_transient(ValueError("no cause"))


class ClientError(Exception):
    """Like botocore's."""

    def __init__(self, status, code=""):
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HTTPClientError(Exception):
    """The base of botocore's errors of connections."""


class ReadTimeoutError(HTTPClientError):
    pass


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def within(outer: Exception, inner: Exception) -> Exception:
    outer.__context__ = inner
    return outer


TENSORSTORE = (
    '{}: Error writing "a/c/0" in OCDBT database: Failed to write 13 bytes to file 17: '
    "{} [os_error_code='{}']"
)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ValueError(TENSORSTORE.format("RESOURCE_EXHAUSTED", "No space left", 28)), False),
        (ValueError(TENSORSTORE.format("UNKNOWN", "Input/output error", 5)), True),
        (ValueError(TENSORSTORE.format("PERMISSION_DENIED", "Permission denied", 13)), False),
        (ValueError("UNAVAILABLE: HTTP response code: 503"), True),
        (ValueError("UNAVAILABLE: connection reset"), True),
        (ValueError("INVALID_ARGUMENT: bad"), False),
        (ClientError(503), True),
        (ClientError(500), True),
        (ClientError(429), True),
        (ClientError(501), False),
        (ClientError(408), True),
        (ClientError(400, "RequestTimeout"), True),
        (ClientError(400, "ExpiredToken"), False),
        (ClientError(403, "InvalidAccessKeyId"), False),
        (ClientError(404, "NoSuchBucket"), False),
        # s3fs makes EIO of what it does not know; the cause knows better.
        (caused(OSError(errno.EIO, "?"), ClientError(400, "InvalidRequest")), False),
        (caused(OSError(errno.EBUSY, "slow"), ClientError(503, "SlowDown")), True),
        (ReadTimeoutError(), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (RuntimeError("bug"), False),
        (within(RuntimeError("wrapped"), OSError(errno.EIO, "?")), True),
        # What was going on when it failed is not why it failed.
        (within(OSError(errno.EIO, "?"), FileNotFoundError(errno.ENOENT, "?")), True),
        (within(OSError(errno.EACCES, "?"), OSError(errno.EIO, "?")), False),
    ],
)
def test_errors_of_libraries_are_sorted_by_their_real_cause(error, transient):
    assert is_transient(error) is transient


def test_out_of_space():
    assert is_out_of_space(ValueError(TENSORSTORE.format("X", "No space left", 28)))
    assert is_out_of_space(caused(ValueError("x"), OSError(errno.EDQUOT, "quota")))
    assert not is_out_of_space(OSError(errno.EIO, "?"))


def flaky(failures):
    left = [failures]

    def attempt():
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "made to fail")
        return "done"

    return attempt


def test_retries_wait_longer_and_longer_and_are_logged(caplog):
    slept: list[float] = []
    policy = RetryPolicy(first_wait_seconds=1, max_wait_seconds=8)
    assert policy.run(flaky(5), "Trying", slept.append) == "done"
    assert len(slept) == 5
    for number, seconds in enumerate(slept):
        assert 0 <= seconds <= min(8, 2**number)
    assert [r.message for r in caplog.records if "Trying failed (attempt 5" in r.message]


def test_retries_end_before_a_deadline():
    slept: list[float] = []
    left = iter([30.0, 20.0, 0.0])
    with pytest.raises(OSError, match="made to fail"):
        RetryPolicy().run(flaky(99), "Trying", slept.append, lambda: next(left))
    assert len(slept) == 2


def test_retries_end_with_the_last_error():
    slept: list[float] = []
    tried = []

    def attempt():
        tried.append(1)
        raise OSError(errno.EIO, "no")

    with pytest.raises(OSError, match="no"):
        RetryPolicy(budget_seconds=0.0).run(attempt, "Trying", slept.append)
    assert len(tried) >= 1
    with pytest.raises(ValueError, match=r"`budget_seconds`.*-1"):
        RetryPolicy(budget_seconds=-1)


# The lock.


def test_lock_of_a_live_process_holds(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from resilient_ckpt.lock import DirectoryLock\n"
        "DirectoryLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        lock = DirectoryLock(tmp_path)
        with pytest.raises(DirectoryInUseError, match=f"process {other.pid} "):
            lock.acquire()
        other.kill()
        other.wait()
        lock.acquire()
        lock.release()
    assert os.listdir(tmp_path) == []


def test_lock_with_a_number_that_is_used_again_is_stale(tmp_path):
    owner = {"host": socket.gethostname(), "pid": 1, "processes": {str(os.getpid()): 12.5}}
    (tmp_path / LOCK_NAME).write_text(json.dumps(owner))
    DirectoryLock(tmp_path).acquire()


def elsewhere(directory, age: float) -> Path:
    path = directory / LOCK_NAME
    owner = {"host": "elsewhere", "machine": "elsewhere", "pid": 1, "processes": {"1": 12.5}}
    path.write_text(json.dumps({**owner, "token": "theirs"}))
    set_age(path, age)
    return path


def set_age(path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_lock_elsewhere_that_stands_still_is_taken_over_at_once_if_old(tmp_path, caplog):
    elsewhere(tmp_path, age=STALE_SECONDS + 5)
    lock = DirectoryLock(tmp_path, sleep=lambda seconds: pytest.fail("nothing to wait for"))
    with caplog.at_level(logging.INFO, logger="resilient_ckpt"):
        lock.acquire()
    assert "on elsewhere, which is gone" in caplog.text
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_elsewhere_is_watched_until_it_is_old(tmp_path):
    path = elsewhere(tmp_path, age=10)
    slept = []
    lock = DirectoryLock(tmp_path, sleep=slept.append)
    began = path.stat().st_mtime
    lock._now = lambda: began + 10 + sum(slept)  # type: ignore[method-assign]
    lock.acquire()
    assert sum(slept) == pytest.approx(STALE_SECONDS - 10, abs=1)


def test_a_lock_elsewhere_whose_heart_beats_holds(tmp_path):
    path = elsewhere(tmp_path, age=10)
    lock = DirectoryLock(tmp_path, sleep=lambda seconds: set_age(path, 0))
    with pytest.raises(DirectoryInUseError, match=r"process 1 on elsewhere.*renewed just now"):
        lock.acquire()


def test_a_lock_in_another_container_is_no_process_of_ours(tmp_path):
    """The process number of a container says nothing in another one."""
    theirs = DirectoryLock(tmp_path, machine="container A")
    theirs.acquire()
    ours = DirectoryLock(tmp_path, sleep=lambda s: set_age(tmp_path / LOCK_NAME, 0))
    with pytest.raises(DirectoryInUseError, match="renewed just now"):
        ours.acquire()
    theirs.release()


def test_a_lock_that_was_taken_over_meanwhile_stops_its_old_owner(tmp_path):
    ours = DirectoryLock(tmp_path)
    ours.acquire()
    ours.check()
    (tmp_path / LOCK_NAME).unlink()
    elsewhere(tmp_path, age=0)
    with pytest.raises(DirectoryInUseError, match="on elsewhere, which took over"):
        ours.check()
    ours.release()
    assert (tmp_path / LOCK_NAME).exists()


def test_a_lock_that_vanished_is_put_there_again(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    lock = DirectoryLock(directory)
    lock.acquire()
    shutil.rmtree(directory)
    lock.check()
    assert (directory / LOCK_NAME).exists()
    lock.release()


def test_a_lock_without_hard_links(tmp_path, monkeypatch):
    def link(*arguments):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", link)
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.acquire()
    with pytest.raises(DirectoryInUseError):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


# Signals.


def test_a_signal_is_heard_while_the_main_thread_is_busy_in_c():
    heard: list[float] = []
    with NoticeListener([SignalSource([signal.SIGUSR1])], lambda n: heard.append(time.monotonic())):
        sent = []

        def send():
            time.sleep(0.1)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=send)
        thread.start()
        # Sorting random integers holds the interpreter in C for about a second, in which no
        # Python handler runs; numpy gives the lock away meanwhile.
        array = np.random.default_rng(0).integers(0, 2**60, 8_000_000)
        array.sort()
        done = time.monotonic()
        thread.join()
    assert sent[0] < heard[0] < done


def test_notice_says_who_what_and_when():
    heard: list = []
    source = SignalSource([signal.SIGUSR1], grace_seconds=30, clock=lambda: 100.0)
    with NoticeListener([source], heard.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 5
        while not heard and time.monotonic() < end:
            time.sleep(0.01)
    (notice,) = heard
    assert (notice.source, notice.kind) == ("SIGUSR1", NoticeKind.PREEMPT)
    assert (notice.received_at, notice.deadline) == (100.0, 130.0)
    assert notice.detail == {"signum": int(signal.SIGUSR1)}


@pytest.mark.parametrize("early", [True, False])
def test_a_signal_to_a_forked_child_is_its_own(early):
    heard: list = []
    with NoticeListener([SignalSource([signal.SIGTERM])], heard.append):
        for _ in range(20 if early else 2):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            if not early:
                time.sleep(0.1)
            os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            assert os.WTERMSIG(status) == signal.SIGTERM
        time.sleep(0.1)
    assert heard == []


def test_signals_work_without_keras():
    code = (
        "import sys, resilient_ckpt.signals, resilient_ckpt.engine, resilient_ckpt.store, "
        "resilient_ckpt.chaos\nassert 'keras' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The child processes.


def test_an_answer_is_not_mixed_with_what_threads_log(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    logging.getLogger("resilient_ckpt.noisy").setLevel(logging.CRITICAL)
    child = Child("noisy_child")
    try:
        for number in range(300):
            assert child.request(number) == [number] * 2000
    finally:
        child.close()


def test_a_child_that_dies_is_an_error_and_is_started_again(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    logging.getLogger("resilient_ckpt.noisy").setLevel(logging.CRITICAL)
    child = Child("noisy_child")
    assert child.request(1) == [1] * 2000
    suspended = psutil.Process(child.pid)
    suspended.suspend()
    threading.Timer(0.5, suspended.kill).start()
    with pytest.raises(ChildDiedError, match="noisy_child"):
        child.request(2)
    assert child.request(3) == [3] * 2000
    child.close()
    assert not child.running


# Snapshot and store.


def test_host_block_copies_and_grows():
    import jax.numpy as jnp

    block = HostBlock()
    first = [jnp.arange(5.0), np.float32(3).reshape(()), jnp.ones((2, 3), "bfloat16")]
    block.reserve_for(first)
    block.copy_in(first)
    for ours, theirs in zip(block.arrays(), first, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs))
    larger = [np.arange(100_000)]
    block.copy_in(larger)
    np.testing.assert_array_equal(block.arrays()[0], larger[0])
    block.close()


def job(step, **record):
    target = Target(Root.PUBLIC, step, {"pytree": {"a": {"w": 0}}})
    return SaveJob((target,), {"epoch": step, "batch": 0, **record}, (0,))


def test_a_replaced_step_survives_a_kill_between_the_renames(tmp_path):
    store = CheckpointStore(tmp_path, RetentionPolicy(None))
    store.save(job(1), [np.arange(3.0)])
    os.rename(tmp_path / "1", tmp_path / ".replaced-1")
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".deleting-7").mkdir()
    store.clean()
    assert os.listdir(tmp_path) == ["1"]
    found = store.load_newest(["pytree"])
    assert found is not None
    np.testing.assert_array_equal(found[1]["pytree"]["a"]["w"], np.arange(3.0))


def test_the_same_step_further_on_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, RetentionPolicy(None))
    store.save(job(1, note="first"), [np.arange(3.0)])
    store.save(job(1, note="second"), [np.arange(4.0)])
    (checkpoint,) = store.checkpoints()
    assert checkpoint.record["note"] == "second"
    assert os.listdir(tmp_path) == ["1"]


def test_a_store_of_non_finite_checkpoints_prefers_the_finite(tmp_path):
    store = CheckpointStore(tmp_path, RetentionPolicy(1))
    store.save(job(1), [np.ones(3)])
    store.save(job(2), [np.array([1.0, np.inf, 2.0])])
    assert [c.step for c in store.checkpoints()] == [1, 2]
    found = store.load_newest(["pytree"])
    assert found is not None
    assert found[0].step == 1
    assert [c.step for c in store.checkpoints()] == [1]


def test_one_to_fall_back_on_is_kept_out_of_sight(tmp_path):
    store = CheckpointStore(tmp_path, RetentionPolicy(1))
    for step in (1, 2, 3):
        store.save(job(step), [np.full(3, float(step))])
    assert [(c.step, c.root) for c in store.checkpoints()] == [(2, Root.RESUME), (3, Root.PUBLIC)]
    array = next(path for path in (tmp_path / "3").rglob("d/*") if path.stat().st_size > 100)
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    found = CheckpointStore(tmp_path).load_newest(["pytree"])
    assert found is not None
    assert found[0].step == 2
    np.testing.assert_array_equal(found[1]["pytree"]["a"]["w"], np.full(3, 2.0))
    assert os.listdir(tmp_path / "quarantine")[0].startswith("3-")
