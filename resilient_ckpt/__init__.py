"""Fault-tolerant, preemption-aware training for Keras 3 on JAX.

The names are imported when they are first used: the writer process needs the store, but
not Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient_ckpt.callback import ResilientCheckpoint
    from resilient_ckpt.errors import (
        CheckpointDamagedError,
        CheckpointMismatchError,
        CheckpointNotFoundError,
        CheckpointsExistError,
        CheckpointUnreadableError,
        DirectoryInUseError,
        HostsMissingError,
        Preempted,
        ResilientCheckpointError,
        SaveFailedError,
    )
    from resilient_ckpt.mirror import Mirror
    from resilient_ckpt.policy import (
        AllOf,
        AnyOf,
        EpochEnd,
        EveryBatches,
        EverySeconds,
        Progress,
        SavePolicy,
    )
    from resilient_ckpt.retention import RetentionPolicy
    from resilient_ckpt.retry import RetryPolicy
    from resilient_ckpt.store import CheckpointStore

_MODULES = {
    "AllOf": "policy",
    "AnyOf": "policy",
    "CheckpointDamagedError": "errors",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "CheckpointStore": "store",
    "CheckpointUnreadableError": "errors",
    "CheckpointsExistError": "errors",
    "DirectoryInUseError": "errors",
    "EpochEnd": "policy",
    "EveryBatches": "policy",
    "EverySeconds": "policy",
    "HostsMissingError": "errors",
    "Mirror": "mirror",
    "Preempted": "errors",
    "Progress": "policy",
    "ResilientCheckpoint": "callback",
    "ResilientCheckpointError": "errors",
    "RetentionPolicy": "retention",
    "RetryPolicy": "retry",
    "SaveFailedError": "errors",
    "SavePolicy": "policy",
}

__all__ = [
    "AllOf",
    "AnyOf",
    "CheckpointDamagedError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointStore",
    "CheckpointUnreadableError",
    "CheckpointsExistError",
    "DirectoryInUseError",
    "EpochEnd",
    "EveryBatches",
    "EverySeconds",
    "HostsMissingError",
    "Mirror",
    "Preempted",
    "Progress",
    "ResilientCheckpoint",
    "ResilientCheckpointError",
    "RetentionPolicy",
    "RetryPolicy",
    "SaveFailedError",
    "SavePolicy",
]


def __getattr__(name: str) -> Any:
    try:
        module = _MODULES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
