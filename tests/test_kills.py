"""SIGKILL at every batch of a real process, and a restart each time."""

from __future__ import annotations

import pytest
from processes import finish, garbage, moment, newest, start

BATCHES = 15


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("plain"), "--plain")


# 3 epochs of 5 batches, with shuffle, dropout, batch normalization, validation,
# EarlyStopping and ReduceLROnPlateau. Saved in the trainer itself, so that it is certain
# which step each kill leaves.
@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
def test_killed_after_every_batch(tmp_path, undisturbed, batch):
    options = {"save_on_background": False, "durability": "process"}
    with start(tmp_path, "--kill-after", batch, **options) as process:
        assert process.wait() == -9
    if batch > 1:
        assert newest(tmp_path).step == batch - 1
    restarted = finish(tmp_path, save_freq="epoch")
    assert restarted == undisturbed
    assert garbage(tmp_path) == []


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_killed_while_the_writer_process_saves(tmp_path, undisturbed, seconds):
    import time

    with start(tmp_path) as process:
        process.wait_for_line(moment("batch_end", step=6))
        time.sleep(seconds)
        process.kill()
    restarted = finish(tmp_path, save_freq="epoch")
    assert restarted == undisturbed
    assert garbage(tmp_path) == []


def test_the_writer_process_ends_with_the_trainer(tmp_path):
    import psutil

    with start(tmp_path) as process:
        process.wait_for_line(moment("batch_end", step=5))
        (writer,) = psutil.Process(process.pid).children()
        process.kill()
        assert writer.wait(timeout=10) is None or not writer.is_running()


def test_a_finished_run_does_nothing(tmp_path, undisturbed):
    assert finish(tmp_path, save_freq="epoch") == undisturbed
    with start(tmp_path, save_freq="epoch") as process:
        assert process.wait() == 0
    assert not any('"batch_end"' in line for line in process.lines)
    assert any("The run had finished" in line for line in process.lines)
    assert finish(tmp_path, save_freq="epoch") == undisturbed


def test_two_runs_in_one_directory_are_refused(tmp_path):
    with start(tmp_path, "--slow-in", "batch_end", "--slow-seconds", 30) as first:
        first.wait_for_line(moment("batch_end"))
        with start(tmp_path) as second:
            assert second.wait() == 1
        assert f"is in use by process {first.pid}" in second.output()
