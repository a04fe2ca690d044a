"""The state of the other callbacks in the `fit` list."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from resilient_ckpt import codec

logger = logging.getLogger(__name__)

# What each of Keras' callbacks remembers between two events, by class; a subclass has its
# own besides. Callbacks that remember nothing stand here too, so that no warning is given.
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "BackupAndRestore": ("_batches_seen_since_last_saving", "_last_batch_seen", "_current_epoch"),
    "CSVLogger": ("keys",),
    "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    "History": ("history", "epoch"),
    "LambdaCallback": (),
    "LearningRateScheduler": (),
    "ModelCheckpoint": (
        "best",
        "_current_epoch",
        "_batches_seen_since_last_saving",
        "_last_batch_seen",
    ),
    "OrbaxCheckpoint": (
        "best",
        "_batches_seen_since_last_saving",
        "_last_batch_seen",
        "_total_batches_seen",
    ),
    "ProgbarLogger": (),
    "ReduceLROnPlateau": ("best", "wait", "cooldown_counter"),
    "RemoteMonitor": (),
    "SwapEMAWeights": ("_ema_weights_in_model",),
    "TensorBoard": ("_global_train_batch", "_global_test_batch", "_previous_epoch_iterations"),
    "TerminateOnNaN": (),
}
_KNOWN = {
    getattr(keras.callbacks, name): attributes
    for name, attributes in _ATTRIBUTES.items()
    if hasattr(keras.callbacks, name)
}
_PLAIN = frozenset(vars(keras.callbacks.Callback()))


def capture(
    callbacks: Sequence[Any], batch_begun: bool = False
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Takes down what the callbacks remember.

    Args:
        callbacks: The callbacks.
        batch_begun: Whether they have heard of the beginning of a batch that will be begun
            again after a restart.

    Returns:
        For each callback a JSON object, and the large arrays that these refer to.
    """
    arrays: list[np.ndarray] = []
    states = []
    for callback in callbacks:
        entry: dict[str, Any] = {"class": type(callback).__name__}
        try:
            entry["state"] = codec.encode(_get(callback, batch_begun), arrays)
        except codec.NotEncodableError as error:
            entry["lost"] = f"its state holds a {error}"
        states.append(entry)
    return states, arrays


def restore(
    callbacks: Sequence[Any],
    states: Sequence[Mapping[str, Any]],
    arrays: Sequence[np.ndarray],
    warn: bool = True,
) -> None:
    """Gives callbacks back what they remembered.

    They are matched by class, and those of one class by their order.

    Args:
        callbacks: The callbacks.
        states: What `capture` gave.
        arrays: The large arrays.
        warn: Whether to say what cannot be restored.
    """
    left = list(states)
    for callback in callbacks:
        name = type(callback).__name__
        entry = next((entry for entry in left if entry["class"] == name), None)
        if entry is None:
            if warn and _remembers(callback):
                logger.warning("Callback %s is new in this run and begins without state.", name)
            continue
        left.remove(entry)
        if "lost" in entry:
            if warn:
                logger.warning("Callback %s is not restored: %s.", name, entry["lost"])
            continue
        state = codec.decode(entry["state"], arrays)
        if state is None:
            if warn and _remembers(callback):
                logger.warning(
                    "Callback %s is not restored: it has no get_state() and set_state(state).", name
                )
            continue
        _set(callback, state)


def prepare(callbacks: Sequence[Any]) -> None:
    """Keeps callbacks from destroying, at their beginning, what the killed run wrote."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True


def _has_protocol(callback: Any) -> bool:
    return callable(getattr(callback, "get_state", None)) and callable(
        getattr(callback, "set_state", None)
    )


def _attributes(callback: Any) -> tuple[str, ...] | None:
    known = [_KNOWN[cls] for cls in type(callback).__mro__ if cls in _KNOWN]
    return tuple(dict.fromkeys(name for names in known for name in names)) if known else None


def _remembers(callback: Any) -> bool:
    if _attributes(callback) is not None and type(callback) in _KNOWN:
        return bool(_attributes(callback))
    own = set(vars(callback)) - _PLAIN
    return any(not callable(vars(callback)[name]) for name in own)


def _get(callback: Any, batch_begun: bool) -> Any:
    if _has_protocol(callback):
        return callback.get_state()
    names = _attributes(callback)
    if names is None:
        return None
    state = {name: getattr(callback, name) for name in names if hasattr(callback, name)}
    if isinstance(callback, keras.callbacks.TensorBoard) and batch_begun:
        state["_global_train_batch"] -= 1
    if isinstance(callback, keras.callbacks.CSVLogger) and os.path.exists(callback.filename):
        state["size"] = os.path.getsize(callback.filename)
    return state


def _set(callback: Any, state: Any) -> None:
    if _has_protocol(callback):
        callback.set_state(state)
        return
    size = state.pop("size", None)
    for name, value in state.items():
        setattr(callback, name, value)
    if size is not None and os.path.exists(callback.filename):
        # Rows of epochs that were run after the checkpoint will be written again.
        os.truncate(callback.filename, min(size, os.path.getsize(callback.filename)))
        callback.append_header = size == 0
