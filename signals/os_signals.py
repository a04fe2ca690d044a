"""Notices that arrive as operating-system signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from resilient_ckpt.signals.notice import NoticeKind, PreemptionNotice

logger = logging.getLogger(__name__)

_STOP_BYTE = b"\0"  # no signal has number 0

_running: weakref.WeakSet[SignalSource] = weakref.WeakSet()


class SignalSource:
    """Hears signals at once, also while the main thread is inside C++.

    A Python signal handler runs only between two bytecodes of the main thread, so not
    during an XLA compilation or a long step. The C-level handler, however, writes the
    signal's number at once to the descriptor set by `signal.set_wakeup_fd`
    (https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd); a thread that
    waits on that descriptor delivers the notice.

    The handler that was there before is called too, in the main thread. What it raises
    is kept in `deferred_exception`, so that it cannot cut short a checkpoint; the owner
    of the source raises it when it is done. Everything is put back by `stop`. In a forked
    child (a data worker, say) the signals get their previous meaning again and nothing is
    delivered.

    Args:
        signals: The signals to hear.
        grace_seconds: How many seconds the sender leaves between this signal and the
            kill, if known; it makes the notice's deadline.
        in_main_thread: Called by the Python-level handler, in the main thread, after the
            previous handler; it may raise, to get the main thread out of a blocking call.
        clock: Gives the time in seconds since the epoch.

    Raises:
        ValueError: If `signals` is empty or holds one that cannot be handled.
    """

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGTERM,),
        grace_seconds: float | None = None,
        in_main_thread: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._signals = tuple(signal.Signals(number) for number in signals)
        if not self._signals:
            raise ValueError("`signals` must name at least one signal, got none.")
        for number in self._signals:
            if number in (signal.SIGKILL, signal.SIGSTOP):
                raise ValueError(f"`signals` holds {number.name}, which no process can handle.")
        if grace_seconds is not None and grace_seconds <= 0:
            raise ValueError(
                f"`grace_seconds` must be a positive number of seconds, got {grace_seconds!r}."
            )
        self._grace_seconds = grace_seconds
        self._in_main_thread = in_main_thread
        self._clock = clock
        self.deferred_exception: BaseException | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup_fd = -1
        self._owner_pid = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._deliver: Callable[[PreemptionNotice], None] | None = None

    def start(self, deliver: Callable[[PreemptionNotice], None]) -> None:
        """Installs the handlers. Python allows that in the main thread only.

        Args:
            deliver: Called from a daemon thread, once for every signal that arrives.

        Raises:
            ValueError: If called outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("Signal handlers can be installed in the main thread only.")
        self._deliver = deliver
        self.deferred_exception = None
        self._owner_pid = os.getpid()
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = (reader, writer)
        # The thread gets the signals blocked: they go to the main thread, whose blocking
        # calls they are to interrupt.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        try:
            self._thread = threading.Thread(
                target=self._watch, args=(reader,), name="resilient-ckpt-signals", daemon=True
            )
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._previous_wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        _running.add(self)

    def stop(self) -> None:
        """Puts the previous handlers and wake-up descriptor back and ends the thread.

        A handler that somebody else installed in the meantime is left alone.
        """
        _running.discard(self)
        self._put_handlers_back()
        if self._sockets is None:
            return
        reader, writer = self._sockets
        self._sockets = None
        with contextlib.suppress(OSError):
            writer.send(_STOP_BYTE)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        reader.close()
        writer.close()

    def _put_handlers_back(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                # A handler that was not installed from Python reads as None and cannot
                # be put back from Python; the default is the nearest thing.
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()
        if self._sockets is not None:
            current = signal.set_wakeup_fd(self._previous_wakeup_fd, warn_on_full_buffer=False)
            if current not in (self._sockets[1].fileno(), -1):
                signal.set_wakeup_fd(current, warn_on_full_buffer=False)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(signal.Signals(number))
        # Ctrl-C's default handler only raises KeyboardInterrupt, which is for the owner
        # of this source to do, after its checkpoint.
        if callable(previous) and previous is not signal.default_int_handler:
            try:
                previous(number, frame)
            except BaseException as error:  # noqa: BLE001 - raised again by the owner
                self.deferred_exception = error
        if self._in_main_thread is not None:
            self._in_main_thread(number)

    def _watch(self, reader: socket.socket) -> None:
        while True:
            data = reader.recv(64)
            if self._previous_wakeup_fd != -1:
                with contextlib.suppress(OSError):
                    os.write(self._previous_wakeup_fd, data.replace(_STOP_BYTE, b""))
            for number in data:
                if number == 0:
                    return
                if number in self._signals and self._deliver is not None:
                    self._deliver(self._notice(signal.Signals(number)))

    def _notice(self, number: signal.Signals) -> PreemptionNotice:
        now = self._clock()
        deadline = None if self._grace_seconds is None else now + self._grace_seconds
        interrupt = number is signal.SIGINT
        return PreemptionNotice(
            source=number.name,
            kind=NoticeKind.INTERRUPT if interrupt else NoticeKind.PREEMPT,
            received_at=now,
            deadline=None if interrupt else deadline,
            detail={"signum": int(number)},
        )

    def _forget_in_child(self) -> None:
        if self._sockets is None:
            return
        self._put_handlers_back()
        for end in self._sockets:
            end.close()
        self._sockets = None
        self._thread = None


# A signal that reaches a child before it has forgotten the handlers would be written to the
# wake-up descriptor that it shares with its parent, which would take it for its own. So no
# signal is let in from before the fork until then.
_masks = threading.local()


def _before_fork() -> None:
    numbers = {number for source in _running for number in source._signals}
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else None


def _after_fork() -> None:
    before = getattr(_masks, "before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _after_fork_in_child() -> None:
    for source in list(_running):
        source._forget_in_child()
    _running.clear()
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
