"""One writer per directory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from resilient_ckpt.errors import DirectoryInUseError

logger = logging.getLogger(__name__)

LOCK_NAME = "resilient.lock"
_PATIENCE_SECONDS = 5.0
_CLOCK_TOLERANCE_SECONDS = 2.0


class DirectoryLock:
    """Keeps two live processes of one host from writing into one directory.

    The lock is a file that names its owner; it appears by a hard link, which is atomic
    also where `flock` is not to be had. The lock of a process that is gone, with its
    writer process, is taken over. A lock of another host cannot be judged from here: it is
    taken over with a warning, since on preemptible machines its owner is most likely gone.

    Args:
        directory: The directory to guard.
        sleep: Waits some seconds.
    """

    def __init__(self, directory: Path, sleep: Callable[[float], None] = time.sleep) -> None:
        self._path = directory / LOCK_NAME
        self._sleep = sleep
        self._writers: list[int] = []
        self.held = False

    def acquire(self) -> None:
        """Takes the lock.

        The dying writer process of a killed owner is waited for, some seconds at most.

        Raises:
            DirectoryInUseError: If another live process of this host holds it.
        """
        if self.held:
            return
        waited = 0.0
        while not self._try_create():
            owner = self._read()
            alive = self._alive_processes(owner)
            if not alive:
                self._remove_stale(owner)
                continue
            if owner.get("pid") in alive or waited >= _PATIENCE_SECONDS:
                raise DirectoryInUseError(
                    f"{self._path.parent} is in use by process {owner.get('pid')} on "
                    f"{owner.get('host')}, which is alive (its processes: {sorted(alive)}). "
                    "Two runs cannot share one directory."
                )
            self._sleep(0.05)
            waited += 0.05
        self.held = True

    def add_writer(self, pid: int) -> None:
        """Notes a further process that writes for this one."""
        self._writers.append(pid)
        if self.held:
            self._write(self._path)

    def release(self) -> None:
        """Gives the lock back."""
        if self.held:
            self._path.unlink(missing_ok=True)
            self.held = False
            self._writers.clear()

    def _try_create(self) -> bool:
        candidate = self._path.with_name(f"{LOCK_NAME}.{socket.gethostname()}.{os.getpid()}")
        self._write(candidate)
        try:
            os.link(candidate, self._path)
        except FileExistsError:
            return False
        finally:
            candidate.unlink(missing_ok=True)
        return True

    def _write(self, path: Path) -> None:
        processes = {
            str(pid): created
            for pid in [os.getpid(), *self._writers]
            if (created := _created(pid)) is not None
        }
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(
            json.dumps(
                {"host": socket.gethostname(), "pid": os.getpid(), "processes": processes},
            )
        )
        os.replace(temporary, path)

    def _read(self) -> dict[str, object]:
        try:
            owner = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _alive_processes(self, owner: dict[str, object]) -> set[int]:
        processes = owner.get("processes")
        if not isinstance(processes, dict):
            return set()
        if owner.get("host") != socket.gethostname():
            logger.warning(
                "%s was held by process %s on host %s, which cannot be seen from here; "
                "taking it over.",
                self._path.parent,
                owner.get("pid"),
                owner.get("host"),
            )
            return set()
        # A process number is used again sooner or later; its start time is not.
        return {int(pid) for pid, created in processes.items() if _is_same(int(pid), created)}

    def _remove_stale(self, owner: dict[str, object]) -> None:
        # Of several that see the same stale lock only one can rename it away.
        stale = self._path.with_name(f"{LOCK_NAME}.stale.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, stale)
            stale.unlink(missing_ok=True)
            if owner:
                logger.info("Took over the lock of process %s, which is gone.", owner.get("pid"))


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
