"""A process of its own that writes checkpoints while training goes on.

Why not a thread: Orbax spends its time in Python (12 s of CPU for 10 000 small arrays) and
in compression and copying; a thread takes the interpreter lock and the cores from the
training loop. The process has the lowest priority, so it runs on what training leaves.
The arrays reach it through shared memory, without a further copy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resilient_ckpt.record import Checkpoint
from resilient_ckpt.snapshot import HostBlock, LeafLayout
from resilient_ckpt.store import CheckpointStore, SaveJob

logger = logging.getLogger(__name__)

_KILL_SECONDS = 5.0
_HEADER = struct.Struct("!Q")
# The child gets this process's import path through its standard input, since scripts may
# have changed it. It gives its priority away first: its imports alone take two seconds of
# a core.
_BOOTSTRAP = """
import os, pickle, sys
os.nice(19)
if hasattr(os, "SCHED_IDLE"):
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except PermissionError:
        pass
sys.path[:] = pickle.load(sys.stdin.buffer)
from resilient_ckpt.writer_process import main
main(int(sys.argv[1]))
"""


@dataclass(frozen=True)
class WriteRequest:
    """What the writer process is sent.

    Args:
        store: The store to write into.
        job: What to write.
        layouts: Where the arrays lie in the shared block; `None` for where they lay in
            the previous request.
        size: Size of the shared block in bytes.
    """

    store: CheckpointStore
    job: SaveJob
    layouts: tuple[LeafLayout, ...] | None
    size: int


class WriterDiedError(RuntimeError):
    """The writer process ended without an answer."""


def send_message(connection: socket.socket, message: object, descriptor: int | None = None) -> None:
    """Sends an object, and with it a file descriptor if one is given."""
    payload = pickle.dumps(message)
    header = _HEADER.pack(len(payload))
    if descriptor is None:
        connection.sendall(header)
    else:
        socket.send_fds(connection, [header], [descriptor])
    connection.sendall(payload)


def receive_message(connection: socket.socket) -> tuple[Any, int | None]:
    """Receives an object and the file descriptor that came with it, if any.

    Raises:
        EOFError: If the other side is gone.
    """
    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
    header += _receive_exactly(connection, _HEADER.size - len(header))
    (length,) = _HEADER.unpack(header)
    message = pickle.loads(_receive_exactly(connection, length))
    return message, descriptors[0] if descriptors else None


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError("The other process is gone.")
        parts += part
    return bytes(parts)


class ProcessWriter:
    """Starts the writer process when it is first needed and hands it one job at a time.

    The engine never has two saves under way; only `close` may be called meanwhile.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._layouts: Sequence[LeafLayout] | None = None
        self._descriptor: int | None = None

    @property
    def running(self) -> bool:
        """Whether the process is up (it takes seconds to import what it needs)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process's number, or `None` while it does not run."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the process, if it does not run."""
        if self.running:
            return
        self.close()
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment,
                # Ctrl-C and the job's signals are the trainer's to judge.
                start_new_session=True,
            )
        self._connection = ours
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(pickle.dumps(sys.path))

    def write(self, store: CheckpointStore, job: SaveJob, block: HostBlock) -> list[Checkpoint]:
        """Writes a job and waits for its commit.

        Args:
            store: The store to write into.
            job: What to write.
            block: The block that the arrays were copied into; not to be changed meanwhile.

        Returns:
            The committed checkpoints.

        Raises:
            WriterDiedError: If the process ended before it answered.
            Exception: What the save raised there.
        """
        self.start()
        connection = self._connection
        assert connection is not None
        layouts = tuple(block.layouts)
        same = layouts == self._layouts and block.fd == self._descriptor
        request = WriteRequest(store, job, None if same else layouts, block.size)
        try:
            send_message(connection, request, None if same else block.fd)
            answer, _ = receive_message(connection)
        except (EOFError, OSError) as error:
            if self._connection is connection:
                self.close()
            raise WriterDiedError(f"The writer process died while saving: {error}") from error
        self._layouts, self._descriptor = layouts, block.fd
        if isinstance(answer, BaseException):
            raise answer
        committed: list[Checkpoint] = answer
        return committed

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            try:
                process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:  # stuck in the kernel, on dead storage
                logger.warning("The writer process %d cannot be ended.", process.pid)
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                # Wakes a thread that waits for the answer, which closing does not.
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._layouts = self._descriptor = None
