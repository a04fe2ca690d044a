"""Checkpoints on disk: save, commit, list, restore, retention, quarantine.

Built on the free functions of Orbax' v1 API (`save_checkpointables`,
`load_checkpointables`); docs/design-notes.md says why not on its `Checkpointer`. A
checkpoint is prepared under a hidden name and counts from the rename to its step on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint

from resilient_ckpt.errors import CheckpointNotFoundError
from resilient_ckpt.record import Checkpoint, Root, read_record, write_record
from resilient_ckpt.retention import RetentionPolicy

logger = logging.getLogger(__name__)
ocp = orbax.checkpoint.v1

QUARANTINE = "quarantine"
WHY_NAME = "why.txt"
_STAGING = ".saving-"
_DELETING = ".deleting-"
_REPLACED = ".replaced-"
_FINITE_CHUNK = 4 << 20

# What Orbax says about every save and what nobody can act on.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Target:
    """One checkpoint to be written.

    Args:
        root: Where to.
        step: Its step.
        trees: For each checkpointable, its nested dictionary of indices into the list of
            arrays.
        extras: Further checkpointables, as they are.
        resumable: Whether a run can continue from it.
    """

    root: Root
    step: int
    trees: Mapping[str, Any]
    extras: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = True


@dataclass(frozen=True)
class SaveJob:
    """Everything to be written at one step, less the arrays.

    Args:
        targets: The checkpoints, which share the arrays.
        record: Goes into every checkpoint.
        weights: Indices of the arrays that must be finite for the state to be good.
    """

    targets: tuple[Target, ...]
    record: Mapping[str, Any]
    weights: tuple[int, ...] = ()


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: The run's directory, on a local or shared file system.
        retention: What to keep.
        durable: Whether a commit waits until everything is on the disk (`fsync`).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        retention: RetentionPolicy | None = None,
        durable: bool = True,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.retention = retention if retention is not None else RetentionPolicy()
        self.durable = durable

    def create(self) -> None:
        """Creates the directory.

        Raises:
            OSError: If it cannot be created or written.
        """
        probe = self.directory / f"{_STAGING}probe-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OSError(
                error.errno, f"`directory` cannot be written: {error.strerror}", str(self.directory)
            ) from error

    def clean(self) -> None:
        """Clears what dead processes left behind. Call it as the directory's only writer."""
        for root in Root:
            for path in self._children(root):
                if path.name.startswith((_STAGING, _DELETING)) or (
                    ".orbax-checkpoint-tmp" in path.name
                ):
                    logger.info("Clearing %s, left by a process that is gone.", path)
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                elif path.name.startswith(_REPLACED):
                    final = path.with_name(path.name.removeprefix(_REPLACED))
                    if final.exists():
                        shutil.rmtree(path)
                    else:  # killed between the two renames of a replacement
                        os.rename(path, final)

    def checkpoints(self) -> list[Checkpoint]:
        """All committed checkpoints, in the order in which the run reached them.

        One whose record cannot be read is listed without it, so that it can be judged,
        and set aside, by trying to restore it.
        """
        found = []
        for root in Root:
            for path in self._children(root):
                if not (path.name.isdecimal() and path.is_dir()):
                    continue
                try:
                    record = read_record(path)
                except (ValueError, OSError) as error:
                    record = {"damaged": str(error)}
                found.append(Checkpoint(int(path.name), root, path, record))
        return sorted(found, key=lambda checkpoint: checkpoint.order)

    def save(self, job: SaveJob, arrays: Sequence[np.ndarray]) -> list[Checkpoint]:
        """Writes and commits the checkpoints of a job, then deletes superfluous ones.

        Args:
            job: What to write.
            arrays: The arrays that its trees point to.

        Returns:
            The committed checkpoints.
        """
        record = {**job.record, "finite": all(_is_finite(arrays[index]) for index in job.weights)}
        committed = [
            self._save_target(target, {**record, "resumable": target.resumable}, arrays)
            for target in job.targets
        ]
        self.prune()
        return committed

    def load(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
        """Reads checkpointables.

        Args:
            checkpoint: Which checkpoint.
            names: Which of its checkpointables; those it lacks are left out.

        Returns:
            For each name its nested dictionary of arrays.

        Raises:
            Exception: Whatever Orbax raises on damaged data.
        """
        with _context():
            present = set(ocp.checkpointables_metadata(checkpoint.path).metadata)
            wanted = {name: None for name in names if name in present}
            return dict(ocp.load_checkpointables(checkpoint.path, wanted))

    def load_newest(
        self,
        names: Sequence[str],
        accept: Callable[[Checkpoint], bool] = lambda checkpoint: True,
    ) -> tuple[Checkpoint, dict[str, Any]] | None:
        """Reads the newest checkpoint that restores and that a run can continue from.

        A finite one goes before every one that holds NaN or Inf. What is newer than the
        one taken is moved to quarantine, with the reason.

        Args:
            names: The checkpointables to read.
            accept: Which checkpoints to consider.

        Returns:
            The checkpoint and what was read, or `None` if there is no checkpoint.

        Raises:
            CheckpointNotFoundError: If there are checkpoints, but none restores.
        """
        candidates = [c for c in self.checkpoints() if accept(c) and c.resumable]
        candidates.sort(key=lambda c: (c.finite, c.order), reverse=True)
        faults: dict[Checkpoint, str] = {}
        for candidate in candidates:
            try:
                if "damaged" in candidate.record:
                    raise ValueError(candidate.record["damaged"])
                loaded = self.load(candidate, names)
                if "pytree" in names and "pytree" not in loaded:
                    raise ValueError("it holds no arrays")
            except Exception as error:  # noqa: BLE001 - kept, logged, and raised if none is left
                faults[candidate] = f"{type(error).__name__}: {error}"
                logger.warning("%s does not restore: %s", candidate.path, faults[candidate])
                continue
            for other in candidates:
                if other in faults:
                    self.quarantine(other, f"It does not restore. {faults[other]}")
                elif other.order > candidate.order:
                    self.quarantine(other, "It holds NaN or Inf; the run went on from before it.")
            if not candidate.finite:
                logger.warning("%s holds NaN or Inf, but no other restores.", candidate.path)
            return candidate, loaded
        if not candidates:
            return None
        listing = "\n".join(f"  {c.path}: {fault}" for c, fault in faults.items())
        raise CheckpointNotFoundError(
            f"None of the {len(faults)} checkpoints in {self.directory} restores:\n{listing}"
        )

    def quarantine(self, checkpoint: Checkpoint, why: str) -> None:
        """Sets a checkpoint aside, for a person to look at.

        Args:
            checkpoint: Which one.
            why: The reason; it is written beside it.
        """
        folder = self.directory / QUARANTINE
        folder.mkdir(exist_ok=True)
        target = folder / f"{checkpoint.step}-{time.time_ns()}"
        os.rename(checkpoint.path, target)
        (target / WHY_NAME).write_text(f"{why}\n")
        logger.warning("Moved checkpoint %d to %s: %s", checkpoint.step, target, why)

    def prune(self) -> None:
        """Deletes what the retention policy calls superfluous.

        A name is taken away in one rename, so a half-deleted checkpoint is never listed.
        """
        for checkpoint in self.retention.superfluous(self.checkpoints()):
            doomed = checkpoint.path.with_name(f"{_DELETING}{checkpoint.step}")
            os.rename(checkpoint.path, doomed)
            shutil.rmtree(doomed)

    def _save_target(
        self, target: Target, record: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> Checkpoint:
        folder = self.directory / target.root.value
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / str(target.step)
        staging = folder / f"{_STAGING}{target.step}"
        for leftover in folder.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover)
        checkpointables = {
            **{name: _fill(tree, arrays) for name, tree in target.trees.items()},
            **target.extras,
        }
        with _context():
            ocp.save_checkpointables(staging, checkpointables)
        write_record(staging, record)
        if self.durable:
            _sync_tree(staging)
        if final.exists():
            # The same step, but further on: its epoch has ended meanwhile.
            os.rename(final, folder / f"{_REPLACED}{target.step}")
        os.rename(staging, final)
        if self.durable:
            _sync(folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder / f"{_REPLACED}{target.step}")
        return Checkpoint(target.step, target.root, final, dict(record))

    def _children(self, root: Root) -> list[Path]:
        folder = self.directory / root.value
        return sorted(folder.iterdir()) if folder.is_dir() else []


def _context() -> Any:
    context = ocp.Context()
    # Trained weights hardly compress, and compressing costs ten times the CPU of writing;
    # the snapshot is ours alone, so Orbax need not copy it.
    context.array_options.saving.use_compression = False
    context.memory_options.deepcopy_host_arrays = False
    return context


def _fill(tree: Any, arrays: Sequence[np.ndarray]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _fill(branch, arrays) for name, branch in tree.items()}
    return arrays[tree]


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype.kind in "biuSU":
        return True
    flat = array.reshape(-1)
    if array.dtype.kind == "V":  # bfloat16 and the 8-bit floats
        flat = flat.astype(np.float32)
    return all(
        bool(np.isfinite(flat[start : start + _FINITE_CHUNK]).all())
        for start in range(0, flat.size, _FINITE_CHUNK)
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
