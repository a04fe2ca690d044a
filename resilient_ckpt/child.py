"""A process of this package's own that serves one request after the other.

It has the lowest priority, so it runs on what training leaves, takes no signals, which are
the trainer's to judge, and ends with the trainer, whatever ends that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_KILL_SECONDS = 5.0
_HEADER = struct.Struct("!Q")
# The child gets this process's import path through its standard input, since scripts may
# have changed it. It gives its priority away first: its imports alone take two seconds of
# a core.
_BOOTSTRAP = """
import importlib, os, pickle, sys
os.nice(19)
if hasattr(os, "SCHED_IDLE"):
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except PermissionError:
        pass
sys.path[:] = pickle.load(sys.stdin.buffer)
importlib.import_module(sys.argv[1]).main(int(sys.argv[2]))
"""


class ChildDiedError(RuntimeError):
    """The process ended without an answer."""


@dataclass(frozen=True)
class _LogLine:
    """What the child logs, for the trainer's own logging to deal with."""

    logger: str
    level: int
    text: str


class Child:
    """Starts the process when it is first needed and hands it one request at a time.

    Args:
        module: The module whose `main(descriptor)` it runs, which calls `serve`.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._guard = threading.Lock()

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
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, self._module, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment,
                # Ctrl-C and the job's signals are the trainer's to judge.
                start_new_session=True,
            )
        with self._guard:
            self._process, self._connection = process, ours
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(pickle.dumps(sys.path))

    def request(self, message: object, descriptor: int | None = None) -> Any:
        """Sends a request and waits for the answer; `close` from another thread ends the wait.

        Args:
            message: The request.
            descriptor: A file descriptor to send with it.

        Returns:
            The answer.

        Raises:
            ChildDiedError: If the process ended before it answered.
            Exception: What the request raised there.
        """
        self.start()
        connection = self._connection
        assert connection is not None
        try:
            _send(connection, message, descriptor)
            while isinstance(answer := _receive(connection)[0], _LogLine):
                logging.getLogger(answer.logger).log(answer.level, "%s", answer.text)
        except (EOFError, OSError) as error:
            if self._connection is connection:
                self.close()
            raise ChildDiedError(f"The process of {self._module} died: {error}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        with self._guard:
            process, self._process = self._process, None
            connection, self._connection = self._connection, None
        if process is not None:
            process.kill()
            try:
                process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:  # stuck in the kernel, on dead storage
                logger.warning("Process %d (%s) cannot be ended.", process.pid, self._module)
        if connection is not None:
            with contextlib.suppress(OSError):
                # Wakes a thread that waits for the answer, which closing does not.
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def serve(descriptor: int, answer: Callable[[Any, int | None], object]) -> None:
    """Answers requests until the trainer closes the connection; runs in the child.

    Args:
        descriptor: The connection, inherited from the trainer.
        answer: Given a request, and the file descriptor that came with it, gives the answer.
    """
    # The trainer decides what a signal means; what is under way is to be finished.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    _exit_with_parent(connection)
    forwarding = _Forwarding(connection)
    logging.basicConfig(level=logging.WARNING, handlers=[forwarding])
    logging.getLogger("resilient_ckpt").setLevel(logging.INFO)
    while True:
        try:
            request, attached = _receive(connection)
        except EOFError:
            return
        reply: object
        try:
            reply = answer(request, attached)
        except Exception as error:  # noqa: BLE001 - raised again in the trainer
            reply = _portable(error)
        forwarding.send(reply)


class _Forwarding(logging.Handler):
    """Sends log records to the trainer, which reads them before the answer."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._sending = threading.RLock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.send(_LogLine(record.name, record.levelno, record.getMessage()))
        except OSError:
            self.handleError(record)

    def send(self, message: object) -> None:
        """Sends a message whole, whatever other threads have to log meanwhile."""
        payload = pickle.dumps(message)
        with self._sending:
            self._connection.sendall(_HEADER.pack(len(payload)) + payload)


def _send(connection: socket.socket, message: object, descriptor: int | None = None) -> None:
    payload = pickle.dumps(message)
    header = _HEADER.pack(len(payload))
    if descriptor is None:
        connection.sendall(header)
    else:
        socket.send_fds(connection, [header], [descriptor])
    connection.sendall(payload)


def _receive(connection: socket.socket) -> tuple[Any, int | None]:
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


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it cannot be sent."""
    error.__traceback__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an exception's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _exit_with_parent(connection: socket.socket) -> None:
    """Ends this process when the trainer is gone: the next run waits for that.

    The closed connection alone would not do: data workers that the trainer forked hold it
    open. Nor would `PR_SET_PDEATHSIG`, which fires when the *thread* that started this
    process ends.
    """
    parent = os.getppid()
    poller = select.poll()
    poller.register(connection, 0)  # hang-up is always reported
    if hasattr(os, "pidfd_open"):
        try:
            poller.register(os.pidfd_open(parent), select.POLLIN)
        except ProcessLookupError:
            os._exit(1)

    def watch() -> None:
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, name="resilient-ckpt-parent", daemon=True).start()
