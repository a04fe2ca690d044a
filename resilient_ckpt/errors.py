"""Every exception that this package raises on its own account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ResilientCheckpointError(Exception):
    """Base of this package's errors."""


class CheckpointMismatchError(ResilientCheckpointError, ValueError):
    """The checkpoint is of another model, optimizer or shape. Nothing was changed.

    Attributes:
        missing: Paths that the model has and the checkpoint lacks.
        extra: Paths that the checkpoint has and the model lacks.
        different: Paths that both have, with another shape or dtype; each with what the
            checkpoint and the model say.
    """

    def __init__(
        self,
        checkpoint: str,
        missing: Sequence[str],
        extra: Sequence[str],
        different: Sequence[str],
    ) -> None:
        self.missing = tuple(missing)
        self.extra = tuple(extra)
        self.different = tuple(different)
        lines = [f"Checkpoint {checkpoint} does not fit this model; nothing was changed."]
        for title, paths in (
            ("Missing in the checkpoint", self.missing),
            ("Extra in the checkpoint", self.extra),
            ("Of another shape or dtype", self.different),
        ):
            if paths:
                lines.append(f"{title} ({len(paths)}):")
                lines.extend(f"  {path}" for path in paths)
        lines.append(
            "If it is the same model, give its layers names: automatic ones such as "
            "'dense_2' count up when a model is built twice in one process "
            "(keras.utils.clear_session() begins anew)."
        )
        super().__init__("\n".join(lines))


class CheckpointDamagedError(ResilientCheckpointError):
    """Files of a checkpoint are not what they were when it was committed.

    Attributes:
        faults: For each file, by its path within the checkpoint, what is wrong with it.
    """

    def __init__(self, checkpoint: str, faults: Mapping[str, str]) -> None:
        self.checkpoint = checkpoint
        self.faults = dict(faults)
        listing = "; ".join(f"{path}: {fault}" for path, fault in self.faults.items())
        super().__init__(f"Checkpoint {checkpoint} is damaged. {listing}")

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, str]]]:
        return type(self), (self.checkpoint, self.faults)


class CheckpointUnreadableError(ResilientCheckpointError):
    """A checkpoint is intact, by its checksums, but cannot be read here."""


class CheckpointsExistError(ResilientCheckpointError):
    """The directory holds another run's checkpoints, and `resume="never"` was asked for."""


class CheckpointNotFoundError(ResilientCheckpointError):
    """The checkpoint that was asked for is not there, or none of those there restores."""


class DirectoryInUseError(ResilientCheckpointError):
    """Another live process writes checkpoints into the same directory."""


class HostsMissingError(ResilientCheckpointError):
    """Some processes of the run did not come to where all must meet.

    Attributes:
        missing: Their indices.
    """

    def __init__(self, what: str, missing: Sequence[int], count: int, seconds: float) -> None:
        self.missing = tuple(missing)
        super().__init__(
            f"{what}: of {count} processes, {list(missing)} did not come within {seconds:.0f} s."
        )


class SaveFailedError(ResilientCheckpointError):
    """A checkpoint that had to be saved could not be saved."""


class Preempted(SystemExit):
    """Training ends because of a notice; the newest state is committed.

    Attributes:
        step: The step of the newest committed checkpoint, or `None` if no batch was run.
        source: Who gave the notice.
    """

    def __init__(self, code: int, source: str, step: int | None) -> None:
        super().__init__(code)
        self.source = source
        self.step = step
