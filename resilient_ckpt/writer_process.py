"""What runs in the writer process. It knows no Keras, and uses the CPU only."""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import select
import signal
import socket
import threading
from collections.abc import Sequence

import numpy as np

from resilient_ckpt.snapshot import LeafLayout, views
from resilient_ckpt.writer import WriteRequest, receive_message, send_message


def main(descriptor: int) -> None:
    """Serves save requests until the trainer closes the connection.

    Args:
        descriptor: The connection, inherited from the trainer.
    """
    # The trainer decides what a signal means; a save under way is to be finished.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    connection = socket.socket(fileno=descriptor)
    _exit_with_parent(connection)
    arrays: Sequence[np.ndarray] = []
    layouts: tuple[LeafLayout, ...] = ()
    while True:
        try:
            request, block = receive_message(connection)
        except EOFError:
            return
        assert isinstance(request, WriteRequest)
        if request.layouts is not None:
            layouts = request.layouts
        if block is not None:
            memory = mmap.mmap(block, request.size, prot=mmap.PROT_READ)
            os.close(block)
            arrays = views(memory, layouts)
        answer: object
        try:
            answer = request.store.save(request.job, arrays)
        except Exception as error:  # noqa: BLE001 - raised again in the trainer
            answer = _portable(error)
        send_message(connection, answer)


def _portable(error: Exception) -> Exception:
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
