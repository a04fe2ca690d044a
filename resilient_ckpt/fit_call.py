"""Finding the running `fit` from inside a callback.

Keras gives a callback neither the list that it is in nor the iterator over the data. Both
are needed for an exact restart, so they are looked up in the calling frames.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import keras
from keras.src.trainers.epoch_iterator import EpochIterator


@dataclass(frozen=True)
class FitCall:
    """A running `fit`.

    Attributes:
        callback_list: Keras' `CallbackList`.
        epoch_iterator: Its iterator over the training data.
        code: The code of the running `fit`.
    """

    callback_list: Any
    epoch_iterator: Any
    code: CodeType


def find_callback_list(callback: Any) -> Any:
    """The `CallbackList` that is calling a callback.

    Args:
        callback: The callback.

    Returns:
        The list, or `None` if the call does not come from one.
    """
    for frame in _callers():
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.callbacks.CallbackList) and callback in owner.callbacks:
            return owner
    return None


def find_fit(callback_list: Any) -> FitCall | None:
    """The `fit` that uses a callback list, if it is among the callers.

    Args:
        callback_list: The list.

    Returns:
        The running `fit`, or `None`.
    """
    for frame in _callers():
        names = frame.f_locals
        if names.get("callbacks") is callback_list and isinstance(
            names.get("epoch_iterator"), EpochIterator
        ):
            return FitCall(callback_list, names["epoch_iterator"], frame.f_code)
    return None


def _callers() -> list[FrameType]:
    frames = []
    frame = inspect.currentframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames
