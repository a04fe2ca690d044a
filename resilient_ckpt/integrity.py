"""Checksums of every file of a checkpoint: made at save, checked at restore.

They are kept per file, not per array: so they cover Orbax' metadata as well, are checked
before anything of the checkpoint is parsed, and hold on any topology, since a file is the
same however its content is to be sharded. XXH3 (https://xxhash.com) reads at memory speed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from resilient_ckpt.errors import CheckpointDamagedError

CHECKSUMS_NAME = "checksums.json"
CHECKSUMS_FORMAT = 1
ALGORITHM = "xxh3_128"
_CHUNK_BYTES = 1 << 20  # stays in the cache between being read and being summed
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileSum:
    """What a file is to be.

    Attributes:
        size: Its length in bytes.
        digest: The XXH3 128-bit hash of its content, in hexadecimal digits.
    """

    size: int
    digest: str


def file_sum(path: Path) -> FileSum:
    """Reads a file and sums it up.

    Args:
        path: The file.

    Returns:
        Its size and digest.
    """
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    size = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
    return FileSum(size, hasher.hexdigest())


def write_checksums(directory: Path) -> None:
    """Writes `checksums.json`, which holds for every other file below `directory`.

    Args:
        directory: A checkpoint that is complete but not committed yet.
    """
    paths = sorted(_files(directory))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(file_sum, [directory / path for path in paths])
        files = {
            path: {"bytes": found.size, "digest": found.digest}
            for path, found in zip(paths, sums, strict=True)
        }
    content = {"format": CHECKSUMS_FORMAT, "algorithm": ALGORITHM, "files": files}
    text = json.dumps({**content, "digest": _digest_of(content)}, indent=1)
    (directory / CHECKSUMS_NAME).write_text(text)


def read_checksums(directory: Path) -> dict[str, FileSum]:
    """Reads what `write_checksums` wrote, which carries a checksum of its own.

    Args:
        directory: A checkpoint.

    Returns:
        What each file is to be, by its path relative to `directory`.

    Raises:
        CheckpointDamagedError: If it is damaged.
        FileNotFoundError: If there is none.
    """
    return parse_checksums((directory / CHECKSUMS_NAME).read_bytes(), str(directory))


def parse_checksums(raw: bytes, where: str) -> dict[str, FileSum]:
    """Takes the content of a `checksums.json` apart.

    Args:
        raw: The content.
        where: The checkpoint, for messages.

    Returns:
        What each file is to be, by its path relative to the checkpoint.

    Raises:
        CheckpointDamagedError: If it is damaged, or of another format.
    """
    try:
        content = json.loads(raw)
        stated = content.pop("digest")
        if content["format"] != CHECKSUMS_FORMAT or content["algorithm"] != ALGORITHM:
            raise ValueError(f"format {content['format']!r}, algorithm {content['algorithm']!r}")
        if stated != _digest_of(content):
            raise ValueError("its own checksum does not match")
        for path in content["files"]:
            # It may have come over a network: nothing outside may be read, or written.
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{path!r} is not within the checkpoint")
        return {
            path: FileSum(int(entry["bytes"]), str(entry["digest"]))
            for path, entry in content["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamagedError(where, {CHECKSUMS_NAME: f"unusable: {error}"}) from error


def verify(directory: Path, required: bool = True) -> bool:
    """Checks every file of a checkpoint.

    Files that the checksums do not name are left out of account: nothing reads them.

    Args:
        directory: The checkpoint.
        required: Whether checksums must be there; plain OrbaxCheckpoint writes none.

    Returns:
        Whether there were checksums.

    Raises:
        CheckpointDamagedError: Naming each file that is missing or not what it was.
        OSError: If a file cannot be read.
    """
    try:
        expected = read_checksums(directory)
    except FileNotFoundError:
        if required:
            raise CheckpointDamagedError(str(directory), {CHECKSUMS_NAME: "missing"}) from None
        return False
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda path: _compare(directory / path, expected[path]), expected)
        faults = {
            path: fault for path, fault in zip(expected, found, strict=True) if fault is not None
        }
    if faults:
        raise CheckpointDamagedError(str(directory), faults)
    return True


def _compare(path: Path, expected: FileSum) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.size:  # no need to read it
            return f"{size} bytes instead of {expected.size}"
        found = file_sum(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "missing"
    if found != expected:
        return f"its content has changed ({ALGORITHM} {found.digest}, was {expected.digest})"
    return None


def _files(directory: Path) -> Iterator[str]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), directory)
            if path != CHECKSUMS_NAME:
                yield path


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
