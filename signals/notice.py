"""What a notice is, and what a source of notices looks like."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class NoticeKind(enum.Enum):
    """What a notice asks for."""

    PREEMPT = "preempt"
    """This machine goes away: checkpoint and leave."""

    INTERRUPT = "interrupt"
    """A person wants the run to stop (Ctrl-C): checkpoint and leave."""


@dataclass(frozen=True)
class PreemptionNotice:
    """Somebody says that this machine, or this process, will go away.

    Attributes:
        source: Who says it, for people: `"SIGTERM"`.
        kind: What is asked for.
        received_at: When it was heard, in seconds since the epoch.
        deadline: When the machine is expected to be gone, in seconds since the epoch,
            or `None` where the source does not say.
        detail: What else the source says; a signal puts its number under `"signum"`.
    """

    source: str
    kind: NoticeKind
    received_at: float
    deadline: float | None = None
    detail: Mapping[str, object] = field(default_factory=dict)


class NoticeSource(Protocol):
    """Something that can hear of a preemption."""

    def start(self, deliver: Callable[[PreemptionNotice], None]) -> None:
        """Begins to listen; every notice heard is handed to `deliver`, from any thread."""

    def stop(self) -> None:
        """Ends listening and puts everything back as it was before `start`."""
