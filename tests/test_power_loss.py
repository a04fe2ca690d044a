"""Power is lost after every single operation of a run of saves; see docs/durability.md."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from resilient_ckpt.chaos.power_loss import crash_states, has_strace, record

from resilient_ckpt.errors import CheckpointDamagedError
from resilient_ckpt.integrity import verify
from resilient_ckpt.record import Root
from resilient_ckpt.store import CheckpointStore, SaveJob, Target

pytestmark = pytest.mark.skipif(not has_strace(), reason="strace is not installed")

# Interval saves, a step that is replaced, one set back, others deleted, one quarantined.
MOMENTS = ((1, 1), (2, 2), (3, 3), (3, 4), (4, 5))
EVERY_SO_MANY_RESTORED = 50


def array(epoch: int) -> np.ndarray:
    return np.arange(300.0) + epoch


def program(directory: Path, marks: Path, durability: str) -> None:
    store = CheckpointStore(directory, durability=durability)
    store.create()
    for step, epoch in MOMENTS:
        target = Target(Root.PUBLIC, step, {"pytree": {"a": {"w": 0}}})
        store.save(SaveJob((target,), {"epoch": epoch, "batch": 0}, (0,)), [array(epoch)])
        (marks / str(epoch)).mkdir()  # The commit was reported.
    store.quarantine(store.checkpoints()[-1], "to see that nothing is lost")
    (marks / "back to 4").mkdir()


def states_of_the_disk(tmp_path, durability: str) -> Iterator[tuple[bool, str]]:
    """For each: whether all that was committed is there, and which state it was."""
    directory, marks, disk = (tmp_path / name for name in ("run", "marks", "disk"))
    directory.mkdir()
    marks.mkdir()
    command = [sys.executable, __file__, str(directory), str(marks), durability]
    states = crash_states(record(command, directory, marks), subsets=2, seed=1)
    for number, state in enumerate(states):
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        state.build(disk)
        committed = state.marks[-1] if state.marks else "0"
        # Of the quarantine that comes last, the deed may or may not be done.
        least = 4 if committed in ("5", "back to 4") else int(committed)
        epoch = restored_epoch(disk, really=number % EVERY_SO_MANY_RESTORED == 0)
        yield epoch >= least, f"after {state.after}, {state.variant}: {epoch} of {committed}"


def restored_epoch(disk: Path, really: bool) -> int:
    """What a restart finds; checked by checksums, and now and then by a whole restore."""
    store = CheckpointStore(disk, durability="process")
    store.clean()
    for checkpoint in reversed(store.checkpoints()):
        if "damaged" in checkpoint.record:
            continue
        try:
            verify(checkpoint.path)
        except CheckpointDamagedError:
            continue
        if really:
            found = store.load_newest(["pytree"])
            assert found is not None
            assert found[0].path == checkpoint.path
            expected = array(checkpoint.record["epoch"])
            np.testing.assert_array_equal(found[1]["pytree"]["a"]["w"], expected)
        return checkpoint.record["epoch"]
    return 0


def test_no_committed_checkpoint_is_lost(tmp_path, capsys):
    states = list(states_of_the_disk(tmp_path, "power-loss"))
    lost = [which for safe, which in states if not safe]
    with capsys.disabled():
        print(f"\npower loss: {len(states)} states of the disk, {len(lost)} lost a commit", end=" ")
    assert lost == []
    assert len(states) > 1000


def test_without_syncing_one_is(tmp_path):
    """The proof can fail: what survives a kill need not survive a loss of power."""
    assert any(not safe for safe, _ in states_of_the_disk(tmp_path, "process"))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    program(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
