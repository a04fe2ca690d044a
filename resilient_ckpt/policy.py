"""When to save: small objects, combined by `|` (either) and `&` (both)."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a run has come, at a moment between two batches.

    Attributes:
        step: Train batches run since the start of the run.
        epoch: The epoch, counted from 0.
        batch: Batches run in this epoch.
        seconds: A monotonic clock, in seconds.
        epoch_end: Whether the epoch is over, its validation and callbacks included.
    """

    step: int
    epoch: int
    batch: int
    seconds: float
    epoch_end: bool = False


class SavePolicy:
    """Decides at every moment between two batches whether to save.

    A subclass overrides `due` and `saved`, and `get_state`/`set_state` if it counts
    something that is to survive a restart.
    """

    def start(self, progress: Progress) -> None:
        """Called where training begins, or continues after a restart."""

    def due(self, progress: Progress) -> bool:
        """Whether to save now. Called between any two batches, so it must be cheap."""
        raise NotImplementedError

    def saved(self, progress: Progress) -> None:
        """Called when this policy, or the combination it is part of, led to a save."""

    def get_state(self) -> dict[str, Any]:
        """What to remember over a restart; JSON values only."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `get_state` gave."""

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return AnyOf(self, other)

    def __and__(self, other: SavePolicy) -> SavePolicy:
        return AllOf(self, other)


class EpochEnd(SavePolicy):
    """Saves at the end of every `every`-th epoch.

    Args:
        every: Number of epochs.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = _positive_int("every", every)

    def due(self, progress: Progress) -> bool:
        """True at the end of every `every`-th epoch."""
        return progress.epoch_end and progress.epoch % self.every == 0


class EveryBatches(SavePolicy):
    """Saves when so many batches were run since the last save, over all epochs.

    Args:
        batches: Number of batches.
    """

    def __init__(self, batches: int) -> None:
        self.batches = _positive_int("batches", batches)
        self._last: int | None = None

    def start(self, progress: Progress) -> None:
        """Counts from here, unless it was told to count from earlier on."""
        if self._last is None or self._last > progress.step:
            self._last = progress.step

    def due(self, progress: Progress) -> bool:
        """True once the batches are run."""
        return progress.step - (self._last or 0) >= self.batches

    def saved(self, progress: Progress) -> None:
        """Counts from here."""
        self._last = progress.step

    def get_state(self) -> dict[str, Any]:
        """The step from which it counts."""
        return {"last": self._last}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Counts from where it did."""
        self._last = state.get("last")


class EverySeconds(SavePolicy):
    """Saves between two batches when so much time has passed since the last save.

    Args:
        interval: The time, as a `timedelta` or in seconds.
    """

    def __init__(self, interval: datetime.timedelta | float) -> None:
        seconds = interval.total_seconds() if isinstance(interval, datetime.timedelta) else interval
        if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
            raise ValueError(f"`interval` must be a positive time, got {interval!r}.")
        self.seconds = float(seconds)
        self._last = -math.inf

    def start(self, progress: Progress) -> None:
        """Counts from here."""
        self._last = progress.seconds

    def due(self, progress: Progress) -> bool:
        """True once the time has passed."""
        return progress.seconds - self._last >= self.seconds

    def saved(self, progress: Progress) -> None:
        """Counts from here."""
        self._last = progress.seconds


class _Combination(SavePolicy):
    def __init__(self, *policies: SavePolicy) -> None:
        for policy in policies:
            if not isinstance(policy, SavePolicy):
                raise TypeError(f"A SavePolicy was expected, got {policy!r}.")
        self.policies = policies

    def start(self, progress: Progress) -> None:
        """Starts all."""
        for policy in self.policies:
            policy.start(progress)

    def saved(self, progress: Progress) -> None:
        """Tells all."""
        for policy in self.policies:
            policy.saved(progress)

    def get_state(self) -> dict[str, Any]:
        """The states of all."""
        return {"policies": [policy.get_state() for policy in self.policies]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Gives each its state; if their number has changed, they begin anew."""
        states = state.get("policies", [])
        if len(states) == len(self.policies):
            for policy, its_state in zip(self.policies, states, strict=True):
                policy.set_state(its_state)


class AnyOf(_Combination):
    """Saves when any of the policies would."""

    def due(self, progress: Progress) -> bool:
        """True if one is due."""
        return any(policy.due(progress) for policy in self.policies)


class AllOf(_Combination):
    """Saves when all of the policies would."""

    def due(self, progress: Progress) -> bool:
        """True if all are due."""
        return all(policy.due(progress) for policy in self.policies)


def policy_from(save_freq: object) -> SavePolicy:
    """Makes a policy of what users write.

    Args:
        save_freq: `"epoch"`, a number of batches, a `datetime.timedelta`, or a policy.

    Returns:
        The policy.

    Raises:
        ValueError: If `save_freq` is none of these.
    """
    if save_freq == "epoch":
        return EpochEnd()
    if isinstance(save_freq, SavePolicy):
        return save_freq
    if isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0:
        return EveryBatches(save_freq)
    if isinstance(save_freq, datetime.timedelta) and save_freq > datetime.timedelta(0):
        return EverySeconds(save_freq)
    raise ValueError(
        f"Unrecognized `save_freq`: {save_freq!r}. Expected 'epoch', a positive number of "
        "batches, a positive datetime.timedelta, or a SavePolicy."
    )


def _positive_int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    return value
