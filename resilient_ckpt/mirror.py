"""The remote tier: committed checkpoints copied to an object store or another file system.

Layout, the same as in the run's directory: `<url>/<step>/…` and `<url>/resume/<step>/…`. The
checksums, which name every other file of a checkpoint, are written last: a checkpoint without
them does not count. They are also what is deleted first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilient_ckpt.errors import CheckpointDamagedError
from resilient_ckpt.integrity import CHECKSUMS_NAME, FileSum, file_sum, parse_checksums
from resilient_ckpt.record import (
    QUARANTINE,
    RECORD_NAME,
    WHY_NAME,
    Checkpoint,
    Root,
    parse_record,
)
from resilient_ckpt.retention import RetentionPolicy
from resilient_ckpt.retry import RetryPolicy

logger = logging.getLogger(__name__)

JOURNAL_PREFIX = ".mirroring-"
_TRANSFERS = 4
_PROGRESS_SECONDS = 10.0
# Where directories are only beginnings of names, and making one might make a bucket.
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}


@dataclass(frozen=True)
class Upload:
    """What an upload came to.

    Attributes:
        files: Files sent.
        nbytes: Their bytes.
        skipped: Files that were there already, of an upload that was broken off.
        seconds: How long it took.
    """

    files: int
    nbytes: int
    skipped: int
    seconds: float


class Mirror:
    """Copies of a run's checkpoints at another place.

    Credentials are taken the usual way of the library that fsspec uses for the place, from the
    environment, a configuration file or the machine's role; they are not accepted in the URL.

    Args:
        url: Any URL of fsspec: `s3://bucket/run`, `gs://…`, `abfs://…`, `file:///…`, or a path.
        retention: What to keep there.
        retry: How each single transfer is retried.

    Raises:
        TypeError: If `url` is not a string.
        ValueError: If fsspec does not know the protocol, or the URL holds credentials.
        ImportError: If fsspec, or its library for the protocol, is not installed.
    """

    def __init__(
        self, url: str, retention: RetentionPolicy | None = None, retry: RetryPolicy | None = None
    ) -> None:
        if not isinstance(url, str) or not url:
            raise TypeError(f"`mirror` must be a URL, got {url!r}.")
        if re.match(r"^\w+://[^/]*:[^/]*@", url):
            raise ValueError(
                "`mirror` must not hold credentials; set them in the environment or the "
                "configuration file of the storage library."
            )
        self.url = url.rstrip("/")
        self.retention = retention if retention is not None else RetentionPolicy()
        self.retry = retry if retry is not None else RetryPolicy()
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(
                f"`mirror`={url!r} needs fsspec; pip install 'resilient-ckpt[mirror]'"
            ) from error
        self._protocol = fsspec.utils.get_protocol(url)
        try:
            fsspec.get_filesystem_class(self._protocol)
        except ValueError as error:
            raise ValueError(f"`mirror`={url!r}: {error}") from error
        except ImportError as error:
            extra = _EXTRAS.get(self._protocol)
            hint = f"; pip install 'resilient-ckpt[{extra}]'" if extra else ""
            raise ImportError(f"`mirror`={url!r}: {error}{hint}") from error
        self._files: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": None}

    # What is there.

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, in the order in which the run reached them.

        Returns:
            The checkpoints; `path` is relative to the mirror's URL.

        Raises:
            Exception: What the storage library raises, after retries.
        """
        found = []
        for folder, files in self._listing().items():
            if CHECKSUMS_NAME in files:
                root, step = _root_and_step(folder)
                record: Mapping[str, Any] = {"damaged": "missing"}
                if RECORD_NAME in files:
                    try:
                        raw = self._read(folder, RECORD_NAME)
                        record = parse_record(raw, f"{self.url}/{folder}")
                    except ValueError as error:
                        record = {"damaged": str(error)}
                found.append(Checkpoint(step, root, Path(folder), record))
        return sorted(found, key=lambda checkpoint: checkpoint.order)

    # To there.

    def upload(
        self,
        directory: Path,
        path: Path,
        report: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.monotonic,
    ) -> Upload | None:
        """Copies a committed checkpoint, and marks it complete at the end.

        An upload that was broken off is continued: what was sent is noted in `directory`.

        Args:
            directory: The run's directory.
            path: The checkpoint's directory in it.
            report: Takes a line on the progress, every ten seconds.
            clock: A monotonic clock, in seconds.

        Returns:
            What was sent, or `None` if the checkpoint was there, or is of plain
            OrbaxCheckpoint.

        Raises:
            CheckpointDamagedError: If the local checkpoint is not what was written.
            OSError: If it cannot be read, or the mirror not be written.
        """
        began = clock()
        folder = path.relative_to(directory).as_posix()
        if path.is_dir() and not (path / CHECKSUMS_NAME).exists():
            logger.warning("%s carries no checksums, and is not mirrored.", path)
            return None
        marker = (path / CHECKSUMS_NAME).read_bytes()
        sums = parse_checksums(marker, str(path))
        there = self._listing().get(folder, {})
        if CHECKSUMS_NAME in there:
            if self._read(folder, CHECKSUMS_NAME) == marker:
                return None
            self._remove(folder, [CHECKSUMS_NAME])  # The step was saved anew, further on.
        _Journal.clear_stale(directory)
        journal = _Journal(directory, folder, marker)
        done = {name for name in journal.done & set(sums) if there.get(name) == sums[name].size}
        missing = {name: expected for name, expected in sums.items() if name not in done}
        progress = _Progress(f"Mirroring {folder}", missing.values(), report, clock)

        def send(name: str) -> None:
            self._send_file(path / name, folder, name, missing[name])
            journal.note(name)
            progress.note(missing[name].size)

        _in_parallel(send, missing)
        self._write(folder, CHECKSUMS_NAME, marker)
        journal.remove()
        self._remove(folder, set(there) - set(sums) - {CHECKSUMS_NAME})
        return Upload(len(missing), progress.total, len(done), clock() - began)

    def prune(self) -> None:
        """Deletes what the retention policy does not keep, and what was broken off.

        To be called when no upload is under way.
        """
        for checkpoint in self.retention.sweep(self.checkpoints()).delete:
            self._delete(checkpoint.path.as_posix())
        for folder, files in self._listing().items():
            if CHECKSUMS_NAME not in files:
                self._delete(folder)

    def set_aside(self, checkpoint: Checkpoint, why: str) -> None:
        """Moves a checkpoint to the folder `quarantine`, for a person to look at.

        Args:
            checkpoint: One of `checkpoints()`.
            why: The reason, written beside it.
        """
        folder = checkpoint.path.as_posix()
        marker = self._read(folder, CHECKSUMS_NAME)
        self._remove(folder, [CHECKSUMS_NAME])  # From here on it does not count.
        target = f"{QUARANTINE}/{folder.replace('/', '-')}-{time.time_ns()}"

        def move(name: str) -> None:
            source, destination = self._at(folder, name), self._at(target, name)
            self._make_parent(destination)
            self.retry.run(lambda: self._fs().mv(source, destination), f"Moving {source}")

        _in_parallel(move, self._listing().get(folder, {}))
        self._write(target, CHECKSUMS_NAME, marker)
        self._write(target, WHY_NAME, f"{why}\n".encode())
        logger.warning("Moved %s/%s to %s: %s", self.url, folder, target, why)

    # From there.

    def fetch(self, checkpoint: Checkpoint, target: Path) -> None:
        """Copies a checkpoint from the mirror and verifies it.

        Args:
            checkpoint: One of `checkpoints()`.
            target: A directory that is not there yet.

        Raises:
            CheckpointDamagedError: If it is not what was uploaded.
            OSError: If the mirror cannot be read, or `target` not be written.
        """
        folder = checkpoint.path.as_posix()
        marker = self._read(folder, CHECKSUMS_NAME)
        sums = parse_checksums(marker, f"{self.url}/{folder}")
        progress = _Progress(f"Fetching {folder}", sums.values(), logger.info, time.monotonic)
        for name in sums:
            (target / name).parent.mkdir(parents=True, exist_ok=True)

        def get(name: str) -> None:
            self._get_file(folder, name, target / name, sums[name])
            progress.note(sums[name].size)

        _in_parallel(get, sums)
        (target / CHECKSUMS_NAME).write_bytes(marker)

    # Single transfers.

    def _send_file(self, source: Path, folder: str, name: str, expected: FileSum) -> None:
        found = file_sum(source)
        if found != expected:
            raise CheckpointDamagedError(str(source.parent), {name: "it has changed on this disk"})
        remote = self._at(folder, name)

        def attempt() -> None:
            self._make_parent(remote)
            self._fs().put_file(str(source), remote)
            size = self._fs().info(remote)["size"]
            if size != expected.size:
                raise OSError(errno.EIO, f"{size} bytes arrived instead of {expected.size}", remote)

        self.retry.run(attempt, f"Uploading {folder}/{name}")

    def _get_file(self, folder: str, name: str, target: Path, expected: FileSum) -> None:
        def attempt() -> None:
            self._fs().get_file(self._at(folder, name), str(target))
            if file_sum(target) != expected:
                raise _ArrivedDamagedError(errno.EIO, "it arrived damaged", name)

        try:
            self.retry.run(attempt, f"Downloading {folder}/{name}")
        except (_ArrivedDamagedError, FileNotFoundError) as error:
            raise CheckpointDamagedError(f"{self.url}/{folder}", {name: str(error)}) from error

    def _listing(self) -> dict[str, dict[str, int]]:
        """For each checkpoint's folder: its files, by relative name, and their sizes."""

        def attempt() -> dict[str, Any]:
            self._fs().invalidate_cache()
            try:
                found: dict[str, Any] = self._fs().find(self._base(), detail=True)
            except FileNotFoundError:
                # An object store has no empty folders; but its bucket must be there.
                if self._protocol in _OBJECT_STORES:
                    self._fs().ls(self._base().split("/")[0])
                return {}
            return found

        folders: dict[str, dict[str, int]] = {}
        base = self._base()
        for path, info in self.retry.run(attempt, f"Listing {self.url}").items():
            relative = posixpath.relpath(path, base)
            found = re.match(r"^((?:resume/)?\d+)/(.+)$", relative)
            if found is not None:
                folders.setdefault(found[1], {})[found[2]] = int(info["size"] or 0)
        return folders

    def _delete(self, folder: str) -> None:
        files = self._listing().get(folder, {})
        if CHECKSUMS_NAME in files:
            self._remove(folder, [CHECKSUMS_NAME])
        self._remove(folder, [name for name in files if name != CHECKSUMS_NAME])
        if self._protocol not in _OBJECT_STORES:
            with contextlib.suppress(OSError):  # empty folders do no harm
                self._fs().rm(self._at(folder), recursive=True)

    def _remove(self, folder: str, names: Iterable[str]) -> None:
        def attempt(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs().rm_file(path)

        for name in names:
            path = self._at(folder, name)
            self.retry.run(functools.partial(attempt, path), f"Deleting {path}")

    def _read(self, folder: str, name: str) -> bytes:
        path = self._at(folder, name)
        content: bytes = self.retry.run(lambda: self._fs().cat_file(path), f"Reading {path}")
        return content

    def _write(self, folder: str, name: str, content: bytes) -> None:
        path = self._at(folder, name)
        self.retry.run(lambda: self._fs().pipe_file(path, content), f"Writing {path}")

    def _make_parent(self, remote: str) -> None:
        if self._protocol not in _OBJECT_STORES:
            self._fs().makedirs(posixpath.dirname(remote), exist_ok=True)

    def _fs(self) -> Any:
        if self._files is None:
            import fsspec

            # What others hold of listings may be old by now.
            self._files = fsspec.filesystem(
                self._protocol, use_listings_cache=False, skip_instance_cache=True
            )
        return self._files

    def _base(self) -> str:
        base: str = self._fs()._strip_protocol(self.url)
        return base

    def _at(self, *names: str) -> str:
        return posixpath.join(self._base(), *names)


class _ArrivedDamagedError(OSError):
    """What was read is not what was written; reading it again may help."""


class _Journal:
    """Notes on the local disk which files of an upload have arrived."""

    def __init__(self, directory: Path, folder: str, marker: bytes) -> None:
        self._path = directory / f"{JOURNAL_PREFIX}{folder.replace('/', '-')}"
        self._head = hashlib.sha256(marker).hexdigest()
        self.done: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            # What follows the last end of a line was cut short.
            head, *names = self._path.read_text().split("\n")[:-1] or [""]
            if head == self._head:
                self.done = set(names)
        if not self.done:
            self._path.write_text(f"{self._head}\n")

    @staticmethod
    def clear_stale(directory: Path) -> None:
        """Removes those of checkpoints that are not there any more."""
        for path in directory.glob(f"{JOURNAL_PREFIX}*"):
            folder = path.name.removeprefix(JOURNAL_PREFIX).replace("-", "/")
            if not (directory / folder).is_dir():
                path.unlink(missing_ok=True)

    def note(self, name: str) -> None:
        with open(self._path, "a") as file:  # one write each, which does not interleave
            file.write(f"{name}\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Progress:
    def __init__(
        self,
        what: str,
        sums: Iterable[FileSum],
        report: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.total = sum(expected.size for expected in sums)
        self._what, self._report, self._clock = what, report, clock
        self._done = 0
        self._began = self._reported = clock()

    def note(self, nbytes: int) -> None:
        self._done += nbytes
        now = self._clock()
        if now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            done, total = self._done / 1e6, self.total / 1e6
            rate = done / max(now - self._began, 1e-9)
            self._report(f"{self._what}: {done:.0f} of {total:.0f} MB, {rate:.0f} MB/s")


def _in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def staging_directory(url: str) -> Path:
    """Where checkpoints lie before they are uploaded, for a run whose directory is a URL.

    Args:
        url: The URL.

    Returns:
        A directory in the user's cache (`XDG_CACHE_HOME`, or `~/.cache`), the same for the
        same URL.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    url = url.rstrip("/")
    name = f"{posixpath.basename(url)}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return Path(cache) / "resilient-ckpt" / name


def _root_and_step(folder: str) -> tuple[Root, int]:
    parent, _, step = folder.rpartition("/")
    return (Root.RESUME if parent else Root.PUBLIC), int(step)


def newer_than(checkpoints: Iterable[Checkpoint], known: Checkpoint | None) -> Iterator[Checkpoint]:
    """Those that a run can better continue from, the best first.

    Args:
        checkpoints: Of a mirror.
        known: The one that is known to be good; `None` for none.

    Yields:
        Checkpoints that a run can continue from, finite ones first.
    """
    usable = [c for c in checkpoints if c.resumable and "damaged" not in c.record]
    for checkpoint in sorted(usable, key=lambda c: (c.finite, c.order), reverse=True):
        if known is None or (checkpoint.finite, checkpoint.order[:4]) > (
            known.finite,
            known.order[:4],
        ):
            yield checkpoint
