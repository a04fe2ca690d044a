"""Making sure that what was written is on the disk, also after a power loss.

A file's content, its name in its directory, and that directory's own name are three
things, each with an `fsync` of its own (fsync(2)); docs/durability.md has the model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

Durability = Literal["power-loss", "process"]
"""What a commit survives: the loss of power, or the death of the process only."""

DURABILITIES: tuple[str, ...] = get_args(Durability)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until everything below a directory, and the directory itself, is on the disk.

    Args:
        directory: The directory; the name it has in its parent is not included.
    """
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def make_directory(path: Path, durability: Durability) -> None:
    """Makes a directory and its parents, where they are missing.

    Args:
        path: The directory.
        durability: With `"power-loss"`, waits until all new names are on the disk.
    """
    new = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        new.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    if durability == "power-loss":
        for folder in reversed(new):
            sync(folder.parent)
