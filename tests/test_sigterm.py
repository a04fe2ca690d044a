"""A real SIGTERM to a real process, in every situation."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from processes import finish, garbage, moment, newest, start

RARELY = {"save_freq": 1000}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("plain"), "--plain")


def terminate(tmp_path, undisturbed, wait_for, step, *arguments, delay=0.0, times=1, **options):
    """Sends SIGTERM at a moment, and checks exit code, saved step and exact resume."""
    with start(tmp_path, *arguments, **{**RARELY, **options}) as process:
        process.wait_for_line(wait_for)
        time.sleep(delay)
        for _ in range(times):
            process.send(signal.SIGTERM)
            time.sleep(0.05 if times > 1 else 0.0)
        assert process.wait() == 128 + signal.SIGTERM, process.output()
    checkpoint = newest(tmp_path)
    assert checkpoint.step == step
    assert checkpoint.record["source"] == "SIGTERM"
    resumed = finish(tmp_path, save_freq="epoch")
    assert resumed == undisturbed
    assert garbage(tmp_path) == []
    return process


def test_between_batches(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.5)
    process = terminate(tmp_path, undisturbed, moment("batch_end", step=7), 7, *slow)
    assert not any('"step": 8' in line for line in process.lines)


def test_before_the_first_batch(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_begin", "--slow-seconds", 1)
    with start(tmp_path, *slow, **RARELY) as process:
        process.wait_for_line(moment("batch_begin", batch=0))
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
    # Nothing was run, so there is nothing to save.
    assert not any(path.name.isdecimal() for path in tmp_path.iterdir())
    assert finish(tmp_path, save_freq="epoch") == undisturbed


def test_in_validation(tmp_path, undisturbed):
    slow = ("--slow-in", "test_batch_end", "--slow-seconds", 0.5)
    process = terminate(tmp_path, undisturbed, moment("test_batch_end", batch=1), 5, *slow)
    assert not any('"epoch_end"' in line for line in process.lines)


def test_in_the_second_validation(tmp_path, undisturbed):
    with start(tmp_path, "--slow-in", "test_batch_end", "--slow-seconds", 0.3) as process:
        process.wait_for_line(moment("epoch_end", epoch=0))
        process.wait_for_line(moment("test_batch_end", batch=2))
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
    assert newest(tmp_path).step == 10
    assert finish(tmp_path, save_freq="epoch") == undisturbed


def test_in_on_epoch_end(tmp_path, undisturbed):
    slow = ("--slow-in", "epoch_end", "--slow-seconds", 1)
    terminate(tmp_path, undisturbed, moment("epoch_end", epoch=0), 5, *slow, delay=0.2)


def test_in_on_epoch_begin(tmp_path, undisturbed):
    slow = ("--slow-in", "epoch_begin", "--slow-seconds", 1)
    terminate(tmp_path, undisturbed, moment("epoch_begin", epoch=1), 5, *slow, delay=0.2)


def test_while_waiting_for_slow_data(tmp_path):
    data = ("--slow-data", 3)
    undisturbed = finish(tmp_path / "undisturbed", *data, "--slow-seconds", 0, **RARELY)
    directory = tmp_path / "run"
    with start(directory, *data, "--slow-seconds", 60, **RARELY) as process:
        # Keras draws batch 0 to build the model; batch 3 of the first epoch is the slow one.
        process.wait_for_line(moment("data_wait"))
        began = time.monotonic()
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
        assert time.monotonic() - began < 20
    assert newest(directory).step >= 1
    resumed = finish(directory, *data, "--slow-seconds", 0, **RARELY)
    assert resumed == undisturbed


def test_while_the_data_source_hangs_in_c(tmp_path):
    data = ("--slow-data", 3)
    undisturbed = finish(tmp_path / "undisturbed", *data, "--slow-seconds", 0, **RARELY)
    directory = tmp_path / "run"
    with start(directory, *data, "--slow-seconds", 1, "--hang", **RARELY) as process:
        process.wait_for_line(moment("data_wait"))
        began = time.monotonic()
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
        assert time.monotonic() - began < 20
    assert newest(directory).step >= 1
    assert newest(directory).record["source"] == "SIGTERM"
    assert finish(directory, *data, "--slow-seconds", 0, **RARELY) == undisturbed


def test_during_a_long_step(tmp_path):
    step = ("--slow-step", 400)
    undisturbed = finish(tmp_path / "undisturbed", *step, **RARELY)
    directory = tmp_path / "run"
    with start(directory, *step, **RARELY) as process:
        process.wait_for_line(moment("batch_begin", batch=2))
        time.sleep(0.1)
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
    assert newest(directory).step == 3
    assert finish(directory, *step, **RARELY) == undisturbed


def test_during_the_first_compilation(tmp_path, undisturbed):
    with start(tmp_path, **RARELY) as process:
        process.wait_for_line(moment("batch_begin", batch=0))
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
    assert newest(tmp_path).step == 1
    assert finish(tmp_path, save_freq="epoch") == undisturbed


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_during_an_interval_save(tmp_path, delay):
    big = ("--weight-megabytes", 100)
    undisturbed = finish(tmp_path / "undisturbed", *big, "--plain")
    directory = tmp_path / "run"
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.5)
    with start(directory, *big, *slow, save_freq=4) as process:
        process.wait_for_line(moment("batch_end", step=5))  # Step 4 is being saved.
        time.sleep(delay)
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output()
    assert newest(directory).step == 5
    assert finish(directory, *big, save_freq="epoch") == undisturbed


def test_twice_in_a_row(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.5)
    terminate(tmp_path, undisturbed, moment("batch_end", step=3), 3, *slow, times=3)


def test_signal_to_a_forked_child_saves_nothing(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.3)
    with start(tmp_path, "--fork", *slow, **RARELY) as p:
        p.wait_for_line(moment("batch_end", step=3))
        children = psutil.Process(p.pid).children()
        assert children
        for child in children:
            os.kill(child.pid, signal.SIGTERM)
        for child in children:
            child.wait(timeout=10)
        assert p.wait() == 0, p.output()
    assert any('"result"' in line for line in p.lines)
    assert newest(tmp_path).record["reason"] == "end"


def test_on_preemption_stop(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.3)
    with start(tmp_path, *slow, on_preemption="stop", **RARELY) as process:
        process.wait_for_line(moment("batch_end", step=7))
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.output()
    # One epoch is complete; the second is left without validation or its callbacks.
    assert sum('"epoch_end"' in line for line in process.lines) == 1
    assert any('"epochs": [0]' in line for line in process.lines)
    assert newest(tmp_path).step == 7
    assert finish(tmp_path, save_freq="epoch") == undisturbed


def test_another_signal_and_exit_code(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.3)
    options = {"signals": [int(signal.SIGUSR1)], "exit_code": 42, **RARELY}
    with start(tmp_path, *slow, **options) as process:
        process.wait_for_line(moment("batch_end", step=2))
        process.send(signal.SIGUSR1)
        assert process.wait() == 42, process.output()
    assert finish(tmp_path, save_freq="epoch") == undisturbed


def test_ctrl_c(tmp_path, undisturbed):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 0.3)
    with start(tmp_path, *slow, **RARELY) as process:
        process.wait_for_line(moment("batch_end", step=4))
        process.send(signal.SIGINT)
        assert process.wait() == -signal.SIGINT  # Python's way to leave by KeyboardInterrupt.
    assert "KeyboardInterrupt" in process.output()
    assert newest(tmp_path).step == 4
    assert finish(tmp_path, save_freq="epoch") == undisturbed


def test_ctrl_c_twice_leaves_at_once(tmp_path):
    slow = ("--slow-in", "batch_end", "--slow-seconds", 60)
    with start(tmp_path, *slow, **RARELY) as process:
        process.wait_for_line(moment("batch_end", step=1))
        process.send(signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        process.send(signal.SIGINT)
        process.wait()
        assert time.monotonic() - began < 20
    assert "KeyboardInterrupt" in process.output()


def test_an_exception_saves_the_newest_state(tmp_path, undisturbed):
    with start(tmp_path, "--fail-after", 8, **RARELY) as process:
        assert process.wait() == 1
    assert "made to fail" in process.output()
    assert newest(tmp_path).step == 8
    assert newest(tmp_path).record["reason"] == "exception"
    assert finish(tmp_path, save_freq="epoch") == undisturbed
