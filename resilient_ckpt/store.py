"""Checkpoints on disk: save, commit, list, restore, retention, quarantine.

Built on the free functions of Orbax' v1 API (`save_checkpointables`,
`load_checkpointables`); docs/design-notes.md says why not on its `Checkpointer`. A
checkpoint is prepared under a hidden name, with the checksums of all its files, and counts
from the rename to its step on.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint

from resilient_ckpt.durability import Durability, make_directory, sync, sync_tree
from resilient_ckpt.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
    SaveFailedError,
)
from resilient_ckpt.integrity import CHECKSUMS_NAME, verify, write_checksums
from resilient_ckpt.multihost import Hosts, hosts
from resilient_ckpt.record import (
    QUARANTINE,
    RECORD_NAME,
    WHY_NAME,
    Checkpoint,
    Root,
    read_record,
    write_record,
)
from resilient_ckpt.retention import FALLBACKS, RetentionPolicy
from resilient_ckpt.retry import RetryPolicy, is_out_of_space, is_transient

logger = logging.getLogger(__name__)
ocp = orbax.checkpoint.v1

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
        durability: What a commit survives: `"power-loss"` (everything is synced to the disk
            before and after the rename that commits) or `"process"`.
        retry: How to treat storage errors that may pass.

    Attributes:
        verified: Directories of checkpoints written or verified by this process.
        pinned: Directories of checkpoints that must stay for now.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        retention: RetentionPolicy | None = None,
        durability: Durability = "power-loss",
        retry: RetryPolicy | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.retention = retention if retention is not None else RetentionPolicy()
        self.durability: Durability = durability
        self.retry = retry if retry is not None else RetryPolicy()
        self.verified: set[Path] = set()
        self.pinned: set[Path] = set()

    def create(self) -> None:
        """Creates the directory.

        Raises:
            OSError: If it cannot be created or written.
        """
        probe = self.directory / f"{_STAGING}probe-{os.getpid()}"
        try:
            make_directory(self.directory, self.durability)
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

        One whose record cannot be understood is listed without it, so that it can be
        judged, and set aside, by trying to restore it.

        Raises:
            OSError: If the directory, or a record, cannot be read.
        """
        found = []
        for root in Root:
            for path in self._children(root):
                if not (path.name.isdecimal() and path.is_dir()):
                    continue
                try:
                    record = read_record(path)
                except ValueError as error:
                    record = {"damaged": str(error)}
                found.append(Checkpoint(int(path.name), root, path, record))
        return sorted(found, key=lambda checkpoint: checkpoint.order)

    def save(
        self,
        job: SaveJob,
        arrays: Sequence[Any],
        time_left: Callable[[], float] = lambda: math.inf,
    ) -> list[Checkpoint]:
        """Writes and commits the checkpoints of a job, then deletes superfluous ones.

        Errors that may pass are retried. On a full disk, everything that need not be kept
        is deleted, and the save is tried once more. Under `jax.distributed` all processes
        call this, on a shared file system; what fails in one fails in all, and is not
        retried.

        Args:
            job: What to write.
            arrays: The arrays that its trees point to: NumPy arrays, or, of several
                processes, global JAX arrays.
            time_left: Seconds after which no further attempt begins.

        Returns:
            The committed checkpoints.

        Raises:
            Exception: The error of the last attempt.
        """
        group = hosts()
        finite = all(_is_finite(arrays[index]) for index in job.weights)
        record = {
            **job.record,
            "finite": all(group.exchange("Saving", "yes" if finite else "")),
            "checksums": CHECKSUMS_NAME,
        }
        what = f"Saving step {job.targets[0].step}"
        committed = []
        for target in job.targets:
            content = {**record, "resumable": target.resumable}
            if group.count > 1:
                committed.append(self._save_together(group, target, content, arrays))
                continue
            attempt = functools.partial(self._save_target, target, content, arrays)
            try:
                checkpoint = self.retry.run(attempt, what, time_left=time_left)
            except Exception as error:
                if not is_out_of_space(error) or not self._make_room():
                    raise
                logger.warning("%s: the disk is full; trying again with the room made.", what)
                checkpoint = attempt()
            committed.append(checkpoint)
            self.verified.add(checkpoint.path)
        try:
            if group.first:
                self.prune()
        except OSError as error:
            # The save itself is committed; the next one sweeps again.
            logger.warning("Superfluous checkpoints could not be deleted: %s", error)
        return committed

    def load(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
        """Verifies a checkpoint and reads checkpointables.

        Args:
            checkpoint: Which checkpoint.
            names: Which of its checkpointables; those it lacks are left out.

        Returns:
            For each name its nested dictionary of arrays.

        Raises:
            CheckpointDamagedError: If it is not what was written; also if it has no
                checksums and Orbax cannot read it.
            CheckpointUnreadableError: If it is what was written, and cannot be read.
            OSError: If the storage fails.
        """
        if "damaged" in checkpoint.record:
            raise CheckpointDamagedError(
                str(checkpoint.path), {RECORD_NAME: checkpoint.record["damaged"]}
            )
        summed = verify(checkpoint.path, required="checksums" in checkpoint.record)
        if not summed:
            logger.warning("%s carries no checksums: it is restored unverified.", checkpoint.path)
        try:
            with _context():
                present = ocp.checkpointables_metadata(checkpoint.path).metadata
                wanted = {name: _on_the_host(present[name]) for name in names if name in present}
                loaded = dict(ocp.load_checkpointables(checkpoint.path, wanted))
            if "pytree" in names and "pytree" not in loaded:
                raise ValueError("it holds no arrays")
        except Exception as error:
            if is_transient(error):
                raise
            what = f"{type(error).__name__}: {error}"
            if summed:
                raise CheckpointUnreadableError(
                    f"Checkpoint {checkpoint.path} is intact, but cannot be read: {what}"
                ) from error
            raise CheckpointDamagedError(str(checkpoint.path), {"(Orbax)": what}) from error
        if summed:
            self.verified.add(checkpoint.path)
        return loaded

    def load_newest(
        self,
        names: Sequence[str],
        accept: Callable[[Checkpoint], bool] = lambda checkpoint: True,
    ) -> tuple[Checkpoint, dict[str, Any]] | None:
        """Reads the newest checkpoint that verifies and that a run can continue from.

        A finite one goes before every one that holds NaN or Inf. What is damaged, or newer
        than the one taken, is moved to quarantine, with the reason. Storage errors that may
        pass are retried.

        Args:
            names: The checkpointables to read.
            accept: Which checkpoints to consider.

        Returns:
            The checkpoint and what was read, or `None` if there is no checkpoint.

        Raises:
            CheckpointNotFoundError: If there are checkpoints, but none is good.
            CheckpointUnreadableError: If the newest good one cannot be read here.
            OSError: If the storage fails for good.
        """
        found = self.retry.run(self.checkpoints, f"Reading {self.directory}")
        candidates = [c for c in found if accept(c) and c.resumable]
        # One without a readable record might be the newest; it is judged, and set aside, first.
        candidates.sort(key=lambda c: ("damaged" in c.record, c.finite, c.order), reverse=True)
        faults: dict[Checkpoint, str] = {}
        for candidate in candidates:
            try:
                loaded = self.retry.run(
                    functools.partial(self.load, candidate, names), f"Reading {candidate.path}"
                )
            except CheckpointDamagedError as error:
                faults[candidate] = str(error)
                logger.warning("%s", error)
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                faults[candidate] = f"It cannot be read: {error}"  # a bad place on the disk
                logger.warning("%s cannot be read: %s", candidate.path, error)
                continue
            for other in candidates:
                if other in faults:
                    self.quarantine(other, faults[other])
                elif other.order > candidate.order:
                    self.quarantine(other, "It holds NaN or Inf; the run went on from before it.")
            if not candidate.finite:
                logger.warning("%s holds NaN or Inf, but no other restores.", candidate.path)
            return candidate, loaded
        if not candidates:
            return None
        listing = "\n".join(f"  {c.path}: {fault}" for c, fault in faults.items())
        raise CheckpointNotFoundError(
            f"None of the {len(faults)} checkpoints in {self.directory} restores; nothing was "
            f"changed:\n{listing}"
        )

    def adopt(self, fetch: Callable[[Path], None], root: Root, step: int) -> None:
        """Takes a checkpoint in from elsewhere; one in its place is set aside.

        Args:
            fetch: Puts its files into the directory it is given, which is not there yet.
            root: Where it is to lie.
            step: Its step.

        Raises:
            CheckpointDamagedError: If what came is damaged.
        """
        folder = self.directory / root.value
        make_directory(folder, self.durability)
        staging = folder / f"{_STAGING}{step}-{os.getpid()}"
        try:
            fetch(staging)
            verify(staging)
            if self.durability == "power-loss":
                sync_tree(staging)
            final = folder / str(step)
            if final.exists():
                self.quarantine(Checkpoint(step, root, final), "Another one takes its place.")
            self._commit(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def quarantine(self, checkpoint: Checkpoint, why: str) -> None:
        """Sets a checkpoint aside, for a person to look at.

        Args:
            checkpoint: Which one.
            why: The reason; it is written beside it.
        """
        folder = self.directory / QUARANTINE
        make_directory(folder, self.durability)
        target = folder / f"{checkpoint.step}-{time.time_ns()}"
        os.rename(checkpoint.path, target)
        self.verified.discard(checkpoint.path)
        (target / WHY_NAME).write_text(f"{why}\n")
        self._sync(folder, checkpoint.path.parent)
        logger.warning("Moved checkpoint %d to %s: %s", checkpoint.step, target, why)

    def prune(self, fallbacks: int = FALLBACKS) -> int:
        """Deletes what the retention policy does not keep.

        Args:
            fallbacks: How many to continue from are kept besides the newest.

        Returns:
            How many checkpoints were deleted.
        """
        sweep = self.retention.sweep(self.checkpoints(), self.verified, self.pinned, fallbacks)
        for checkpoint in sweep.set_back:
            self._set_back(checkpoint)
        for checkpoint in sweep.delete:
            self._delete(checkpoint.path)
        return len(sweep.delete)

    def _set_back(self, checkpoint: Checkpoint) -> None:
        folder = self.directory / Root.RESUME.value
        make_directory(folder, self.durability)
        target = folder / str(checkpoint.step)
        if target.exists():  # the same step, taken earlier, in its validation
            self._delete(target)
        os.rename(checkpoint.path, target)
        self._sync(folder, checkpoint.path.parent)
        if checkpoint.path in self.verified:
            self.verified.remove(checkpoint.path)
            self.verified.add(target)

    def _delete(self, path: Path) -> None:
        """Takes the name away in one rename, so that a half-deleted checkpoint never counts."""
        doomed = path.with_name(f"{_DELETING}{path.name}")
        os.rename(path, doomed)
        self.verified.discard(path)
        # Else a power loss might bring the name back over half of the content.
        self._sync(path.parent)
        shutil.rmtree(doomed)

    def _make_room(self) -> bool:
        return self.prune(fallbacks=0) > 0

    def _save_target(
        self, target: Target, record: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> Checkpoint:
        folder = self.directory / target.root.value
        make_directory(folder, self.durability)
        # No other process' staging is touched: it may hang in there.
        staging = folder / f"{_STAGING}{target.step}-{os.getpid()}"
        final = folder / str(target.step)
        # Threads of Orbax may have gone on writing after an earlier attempt had failed.
        _clear(staging)
        try:
            self._stage(staging, target, record, arrays)
            self._commit(staging, final)
        except BaseException:
            _clear(staging)
            raise
        return Checkpoint(target.step, target.root, final, dict(record))

    def _save_together(
        self, group: Hosts, target: Target, record: Mapping[str, Any], arrays: Sequence[Any]
    ) -> Checkpoint:
        """Saves as one of several processes; the first one completes and commits."""
        folder = self.directory / target.root.value
        staging = folder / f"{_STAGING}{target.step}-{group.count}-processes"
        final = folder / str(target.step)
        if group.first:
            make_directory(folder, self.durability)
            shutil.rmtree(staging, ignore_errors=True)
        group.exchange(f"Beginning to save step {target.step}")
        fault = ""
        try:
            self._write(staging, target, arrays)
            if self.durability == "power-loss":
                sync_tree(staging)  # each what it has written
        except Exception as error:  # noqa: BLE001 - told to the others, and raised
            fault = f"{type(error).__name__}: {error}"
        faults = group.exchange(f"Saving step {target.step}", fault)
        outcome = ""
        if group.first and not any(faults):
            try:
                self._complete(staging, record)
                self._commit(staging, final)
            except Exception as error:  # noqa: BLE001 - told to the others, and raised
                outcome = f"{type(error).__name__}: {error}"
        failed = [f for f in (*faults, *group.exchange(f"Committing {target.step}", outcome)) if f]
        if failed:
            if group.first:
                shutil.rmtree(staging, ignore_errors=True)
            raise SaveFailedError(f"Step {target.step} could not be saved: {'; '.join(failed)}")
        return Checkpoint(target.step, target.root, final, dict(record))

    def _commit(self, staging: Path, final: Path) -> None:
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():
            # The same step, but further on: its epoch has ended meanwhile.
            os.rename(final, replaced)
        try:
            os.rename(staging, final)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        self._sync(final.parent)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(replaced)

    def _stage(
        self,
        staging: Path,
        target: Target,
        record: Mapping[str, Any],
        arrays: Sequence[np.ndarray],
    ) -> None:
        # Where the directory cannot be made, threads of Orbax wait for it for minutes, also
        # beyond the end of the script; so that is tried first.
        staging.mkdir()
        staging.rmdir()
        self._write(staging, target, arrays)
        self._complete(staging, record)

    def _write(self, staging: Path, target: Target, arrays: Sequence[Any]) -> None:
        checkpointables = {
            **{name: _fill(tree, arrays) for name, tree in target.trees.items()},
            **target.extras,
        }
        with _context():
            ocp.save_checkpointables(staging, checkpointables)

    def _complete(self, staging: Path, record: Mapping[str, Any]) -> None:
        write_record(staging, record)
        write_checksums(staging)
        if self.durability == "power-loss":
            sync_tree(staging)

    def _sync(self, *folders: Path) -> None:
        if self.durability == "power-loss":
            for folder in folders:
                sync(folder)

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


def _clear(staging: Path) -> None:
    # Orbax' own temporary folder follows the name after a dot; without it, process 12 would
    # clear what process 123 writes.
    for leftover in (staging, *staging.parent.glob(f"{staging.name}.*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _on_the_host(metadata: Any) -> Any:
    """Has arrays read as NumPy arrays, whatever devices they were on."""

    def like(leaf: Any) -> Any:
        return np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)  # takes no memory

    return jax.tree.map(like, metadata)


def _fill(tree: Any, arrays: Sequence[np.ndarray]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _fill(branch, arrays) for name, branch in tree.items()}
    return arrays[tree]


def _is_finite(array: Any) -> bool:
    if not isinstance(array, np.ndarray):  # of several processes: what this one has of it
        return all(_is_finite(np.asarray(shard.data)) for shard in array.addressable_shards)
    if array.dtype.kind in "biuSU":
        return True
    flat = array.reshape(-1)
    if array.dtype.kind == "V":  # bfloat16 and the 8-bit floats
        flat = flat.astype(np.float32)
    return all(
        bool(np.isfinite(flat[start : start + _FINITE_CHUNK]).all())
        for start in range(0, flat.size, _FINITE_CHUNK)
    )
