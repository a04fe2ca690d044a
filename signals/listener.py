"""Runs notice sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from resilient_ckpt.signals.notice import NoticeSource, PreemptionNotice


class NoticeListener:
    """Runs a set of sources and hands what they hear to one function.

    Args:
        sources: The sources to run.
        on_notice: Called with every notice, from whatever thread heard it; it must be
            quick and must not raise.
    """

    def __init__(
        self, sources: Sequence[NoticeSource], on_notice: Callable[[PreemptionNotice], None]
    ) -> None:
        self._sources = tuple(sources)
        self._on_notice = on_notice
        self._running: list[NoticeSource] = []

    def start(self) -> None:
        """Starts every source; if one fails to start, those already running are stopped."""
        if self._running:
            raise RuntimeError("This NoticeListener is running already.")
        try:
            for source in self._sources:
                source.start(self._on_notice)
                self._running.append(source)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops the sources in reverse order. May be called more than once."""
        while self._running:
            self._running.pop().stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
