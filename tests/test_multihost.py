"""Several real processes that save together; so far by the store alone, see README.md."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resilient_ckpt import CheckpointDamagedError, CheckpointStore
from resilient_ckpt.integrity import verify

MEMBER = """
import os, sys, signal
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
index, count, port, directory, fault = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from resilient_ckpt import CheckpointStore, HostsMissingError, multihost
from resilient_ckpt.record import Root
from resilient_ckpt.store import SaveJob, Target
multihost.AGREE_SECONDS = 5.0
mesh = Mesh(np.array(jax.devices()), ("devices",))
store = CheckpointStore(directory)
for step in (1, 2, 3):
    full = np.arange(64.0).reshape(8, 8) + step
    if fault == "nan" and step == 3:
        full[7, 7] = np.nan  # in the last process' part
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    array = jax.make_array_from_callback((8, 8), sharding, lambda place: full[place])
    if fault == "disk" and step == 3:
        def complete(*arguments): raise OSError(28, "No space left on device")
        store._complete = complete
    if fault == "kill" and step == 3 and index == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    job = SaveJob((Target(Root.PUBLIC, step, {"pytree": {"w": 0}}),), {"epoch": step}, (0,))
    try:
        store.save(job, [array])
    except HostsMissingError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)  # Else JAX waits for the missing one at the end, for minutes.
    print("saved", step, flush=True)
"""


def run(directory: Path, count: int, fault: str = "none") -> list[subprocess.CompletedProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(i), str(count), str(port), str(directory), fault],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    done = []
    for member in members:
        out, err = member.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(member.args, member.returncode, out, err))
    return done


def saved(member: subprocess.CompletedProcess) -> list[int]:
    lines = member.stdout.splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("saved")]


def restored(directory: Path) -> tuple[int, np.ndarray]:
    found = CheckpointStore(directory).load_newest(["pytree"])
    assert found is not None
    return found[0].step, np.asarray(found[1]["pytree"]["w"])


@pytest.mark.parametrize("count", [2, 4])
def test_every_shard_is_summed_and_restores_on_one_process(tmp_path, count):
    for member in run(tmp_path, count):
        assert member.returncode == 0, member.stderr
        assert saved(member) == [1, 2, 3]
    step, array = restored(tmp_path)
    assert step == 3
    np.testing.assert_array_equal(array, np.arange(64.0).reshape(8, 8) + 3)
    # A bit flipped in the part of any process is found.
    for index in range(count):
        shards = tmp_path / "3" / "pytree" / f"ocdbt.process_{index}" / "d"
        path = max(shards.iterdir(), key=lambda p: p.stat().st_size)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointDamagedError, match=path.name):
            verify(tmp_path / "3")
        path.write_bytes(content)
    verify(tmp_path / "3")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".saving")]


def test_nan_in_one_process_counts_for_all(tmp_path):
    assert [member.returncode for member in run(tmp_path, 2, "nan")] == [0, 0]
    finite = {c.step: c.finite for c in CheckpointStore(tmp_path).checkpoints()}
    assert finite == {1: True, 2: True, 3: False}
    assert restored(tmp_path)[0] == 2


def test_a_commit_that_fails_in_one_process_fails_in_all(tmp_path):
    for member in run(tmp_path, 2, "disk"):
        assert member.returncode == 1
        assert saved(member) == [1, 2]
        assert "Step 3 could not be saved: OSError: [Errno 28]" in member.stderr
    assert restored(tmp_path)[0] == 2


def test_a_process_killed_leaves_no_half_commit_and_is_named(tmp_path):
    first, last = run(tmp_path, 2, "kill")
    assert last.returncode == -signal.SIGKILL
    assert first.returncode == 3
    assert "of 2 processes, [1] did not come within 5 s" in first.stderr
    assert restored(tmp_path)[0] == 2
    assert os.listdir(tmp_path)
