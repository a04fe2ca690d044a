"""One writer per directory."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from resilient_ckpt.errors import DirectoryInUseError

logger = logging.getLogger(__name__)

LOCK_NAME = "resilient.lock"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A lock of another machine whose heart has not beaten for so long is taken over."""

_held_tokens: set[str] = set()
"""Of the locks that this process holds."""

_PATIENCE_SECONDS = 5.0
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_CLOCK_TOLERANCE_SECONDS = 2.0


class DirectoryLock:
    """Keeps two live processes from writing into one directory.

    The lock is a file that names its owner: host, process, its start time, and those of the
    processes that write for it. It appears by a hard link, which is atomic also on file
    systems without `flock`, such as NFS (open(2), "O_EXCL"). The lock of a process that is gone,
    with its writer, is taken over at once. Of an owner on another machine, or in another
    container, nothing can be seen but its heartbeat: the time stamp of the file, compared
    with that of a new file, so that no two clocks are compared. It must have stood still
    for 30 s.

    A process that was itself stopped for so long may find that its lock was taken over; it
    then must not write any more, see `check`.

    Args:
        directory: The directory to guard.
        sleep: Waits some seconds.
        machine: What this process shares with those whose process numbers it can see.
    """

    def __init__(
        self,
        directory: Path,
        sleep: Callable[[float], None] = time.sleep,
        machine: str | None = None,
    ) -> None:
        self._path = directory / LOCK_NAME
        self._sleep = sleep
        self._machine = machine if machine is not None else _machine()
        self._token = uuid.uuid4().hex
        self._writers: list[int] = []
        self._stopping = threading.Event()
        self._heart: threading.Thread | None = None
        self.held = False

    def acquire(self) -> None:
        """Takes the lock.

        The dying writer process of a killed owner is waited for, some seconds at most; the
        heartbeat of an owner elsewhere, 30 s at most.

        Raises:
            DirectoryInUseError: If another live process holds it.
        """
        if self.held:
            return
        waited = 0.0
        while not self._try_create():
            owner = self._read()
            if owner.get("machine", self._machine) != self._machine:
                self._wait_for_heartbeat(owner)
                self._remove_stale(owner)
                continue
            alive = _alive_processes(owner)
            if not alive or (owner.get("pid") == os.getpid() and self._is_forgotten(owner)):
                self._remove_stale(owner)
                continue
            if owner.get("pid") in alive or waited >= _PATIENCE_SECONDS:
                raise self._in_use(owner, f"which is alive (its processes: {sorted(alive)})")
            self._sleep(0.05)
            waited += 0.05
        self.held = True
        _held_tokens.add(self._token)
        self._stopping.clear()
        self._heart = threading.Thread(target=self._beat, name="resilient-ckpt-lock", daemon=True)
        self._heart.start()

    def add_writer(self, pid: int) -> None:
        """Notes a further process that writes for this one."""
        self._writers.append(pid)
        if self.held and self._is_ours():
            self._write(self._path)

    def check(self) -> None:
        """To be called before anything is written.

        A lock that has vanished, with its directory perhaps, is put there again.

        Raises:
            DirectoryInUseError: If another process has taken the lock over.
        """
        if not self.held:
            return
        try:
            owner = json.loads(self._path.read_text())
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._try_create():
                logger.warning("%s had vanished; it is there again.", self._path)
                return
            owner = self._read()
        except ValueError:
            owner = {}
        if owner.get("token") != self._token:
            raise self._in_use(
                owner, f"which took over while this process stood still (for {STALE_SECONDS:.0f} s)"
            )

    def release(self) -> None:
        """Gives the lock back."""
        if not self.held:
            return
        self._stopping.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        try:
            if self._is_ours():
                self._path.unlink(missing_ok=True)
        except OSError as error:
            # It will be found stale: this process is gone by then, or says so itself.
            logger.warning("The lock %s cannot be removed: %s", self._path, error)
        self.held = False
        _held_tokens.discard(self._token)
        self._writers.clear()

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT_SECONDS):
            try:
                if self._is_ours():
                    os.utime(self._path)
            except OSError as error:
                logger.warning("The lock %s cannot be renewed: %s", self._path, error)

    def _is_forgotten(self, owner: Mapping[str, Any]) -> bool:
        """Whether this process left it behind, unable to remove it."""
        return owner.get("token") not in _held_tokens

    def _is_ours(self) -> bool:
        return self._read().get("token") == self._token

    def _wait_for_heartbeat(self, owner: Mapping[str, Any]) -> None:
        logger.info(
            "%s is locked by process %s on %s; waiting whether its heart beats.",
            self._path.parent,
            owner.get("pid"),
            owner.get("host"),
        )
        first = self._last_beat()
        while first is not None:
            if self._now() - first >= STALE_SECONDS:
                return
            self._sleep(1.0)
            last = self._last_beat()
            if last != first and last is not None:
                raise self._in_use(owner, "whose lock was renewed just now")
            first = last

    def _last_beat(self) -> float | None:
        try:
            # NFS asks its server for a file's attributes when the file is opened.
            with open(self._path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The time by the clock of the file system."""
        probe = self._path.with_name(f"{LOCK_NAME}.{self._token}.now")
        probe.write_bytes(b"")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _in_use(self, owner: Mapping[str, Any], why: str) -> DirectoryInUseError:
        return DirectoryInUseError(
            f"{self._path.parent} is in use by process {owner.get('pid')} on "
            f"{owner.get('host')}, {why}. Two runs cannot share one directory."
        )

    def _try_create(self) -> bool:
        candidate = self._path.with_name(f"{LOCK_NAME}.{self._token}")
        self._write(candidate)
        try:
            os.link(candidate, self._path)
        except FileExistsError:
            # An answer of NFS that was lost and asked for again: the link is ours after all.
            return candidate.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return self._create_exclusively(candidate.read_text())
        finally:
            candidate.unlink(missing_ok=True)
        return True

    def _create_exclusively(self, content: str) -> bool:
        try:
            with open(self._path, "x") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def _write(self, path: Path) -> None:
        processes = {
            str(pid): created
            for pid in [os.getpid(), *self._writers]
            if (created := _created(pid)) is not None
        }
        temporary = path.with_name(f"{path.name}.new")
        owner = {
            "host": socket.gethostname(),
            "machine": self._machine,
            "pid": os.getpid(),
            "processes": processes,
            "token": self._token,
        }
        temporary.write_text(json.dumps(owner))
        os.replace(temporary, path)

    def _read(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _remove_stale(self, owner: Mapping[str, Any]) -> None:
        # Of several that see the same stale lock only one can rename it away.
        stale = self._path.with_name(f"{LOCK_NAME}.{self._token}.stale")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, stale)
            stale.unlink(missing_ok=True)
            if owner:
                logger.info(
                    "Took over the lock of process %s on %s, which is gone.",
                    owner.get("pid"),
                    owner.get("host"),
                )


def _machine() -> str:
    """Names the set of processes whose numbers this process can see.

    Containers on one machine share its name or its boot id, but not the process numbers.
    """
    parts = [socket.gethostname()]
    for path, read in (
        ("/proc/sys/kernel/random/boot_id", lambda p: Path(p).read_text().strip()),
        ("/proc/self/ns/pid", os.readlink),
    ):
        with contextlib.suppress(OSError):
            parts.append(read(path))
    return " ".join(parts)


def _alive_processes(owner: Mapping[str, Any]) -> set[int]:
    processes = owner.get("processes")
    if not isinstance(processes, dict):
        return set()
    # A process number is used again sooner or later; its start time is not.
    return {int(pid) for pid, created in processes.items() if _is_same(int(pid), created)}


def _is_same(pid: int, created: float) -> bool:
    now = _created(pid)
    return now is not None and abs(now - created) < _CLOCK_TOLERANCE_SECONDS


def _created(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except psutil.NoSuchProcess:
        return None
