"""What is written beside the arrays of a checkpoint, and how it is read again."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD_NAME = "resilient.json"
RECORD_FORMAT = 1

QUARANTINE = "quarantine"
"""The folder for checkpoints that are set aside, for a person to look at."""

WHY_NAME = "why.txt"
"""The file in there that says why."""


class Root(enum.Enum):
    """Where in the run's directory a checkpoint lies."""

    PUBLIC = "."
    """Beside each other in the directory itself: what plain Keras loads."""

    RESUME = "resume"
    """In a folder of their own: newest states that plain Keras is not to load, because
    only best or weights-only checkpoints were asked for, or because they were taken
    during a validation."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as listed; its arrays are not read.

    Attributes:
        step: Train batches run since the start of the run.
        root: Where it lies.
        path: Its directory.
        record: The content of its `resilient.json`; empty for a checkpoint of plain
            `keras.callbacks.OrbaxCheckpoint`.
    """

    step: int
    root: Root
    path: Path
    record: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def order(self) -> tuple[int, int, int, int, int]:
        """Sorts checkpoints by how far the run had come."""
        record = self.record
        return (
            record.get("phase", 0),
            self.step,
            record.get("epoch", 0),
            record.get("batch", 0),
            self.root is Root.RESUME,
        )

    @property
    def finite(self) -> bool:
        """Whether its weights are free of NaN and Inf (unknown counts as yes)."""
        return bool(self.record.get("finite", True))

    @property
    def resumable(self) -> bool:
        """Whether it holds all that a run needs to continue."""
        return bool(self.record.get("resumable", True))

    @property
    def metric(self) -> float | None:
        """The monitored value at this step, if it was known."""
        value = self.record.get("metric")
        return None if value is None else float(value)


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Writes the record into a checkpoint that is not committed yet."""
    (directory / RECORD_NAME).write_text(json.dumps({"format": RECORD_FORMAT, **record}))


def read_record(directory: Path) -> dict[str, Any]:
    """Reads a checkpoint's record.

    Args:
        directory: The checkpoint's directory.

    Returns:
        The record; empty if there is none.

    Raises:
        ValueError: If it cannot be understood, or is of a newer format.
    """
    path = directory / RECORD_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    return parse_record(raw, str(path))


def parse_record(raw: bytes, where: str) -> dict[str, Any]:
    """Takes the content of a `resilient.json` apart.

    Args:
        raw: The content.
        where: Where it was found, for messages.

    Returns:
        The record.

    Raises:
        ValueError: If it cannot be understood, or is of a newer format.
    """
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise ValueError(f"{where} is of format {found!r}; this version reads {RECORD_FORMAT}.")
    return record
