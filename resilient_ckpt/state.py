"""The variables of a model: captured as they are on disk, and strictly restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from resilient_ckpt.errors import CheckpointMismatchError

WEIGHTS = ("trainable_variables", "non_trainable_variables")
GROUPS = (*WEIGHTS, "optimizer_variables", "metrics_variables")


class TrainState:
    """The variables of a built and compiled model, in the groups and order of Keras' trainer.

    Args:
        model: The model.

    Raises:
        ValueError: If two variables of one group share a path.
    """

    def __init__(self, model: Any) -> None:
        optimizer = model.optimizer
        self.variables: dict[str, list[Any]] = {
            "trainable_variables": list(model.trainable_variables),
            "non_trainable_variables": list(model.non_trainable_variables),
            "optimizer_variables": list(optimizer.variables) if optimizer is not None else [],
            "metrics_variables": list(model.metrics_variables),
        }
        self.tree: dict[str, Any] = {}
        index = 0
        for group in GROUPS:
            branch: dict[str, Any] = {}
            for variable in self.variables[group]:
                _put(branch, variable.path, index)
                index += 1
            self.tree[group] = branch
        self.weights_tree = {group: self.tree[group] for group in WEIGHTS}
        self.trainable_indices = tuple(range(len(self.variables["trainable_variables"])))

    def values(self) -> list[Any]:
        """The variables' own arrays (during an epoch the trainer holds newer ones)."""
        return [variable.value for group in GROUPS for variable in self.variables[group]]

    def check(self, tree: Mapping[str, Any], where: str, groups: Sequence[str] = GROUPS) -> None:
        """Compares a checkpoint's arrays with the variables.

        Args:
            tree: Nested dictionaries of arrays, by group.
            where: The checkpoint, for the message.
            groups: The groups to compare.

        Raises:
            CheckpointMismatchError: If paths, shapes or dtypes differ.
        """
        missing: list[str] = []
        extra: list[str] = []
        different: list[str] = []
        for group in groups:
            saved = dict(_flatten(tree.get(group) or {}))
            for variable in self.variables[group]:
                path = f"{group}/{variable.path}"
                array = saved.pop(variable.path, None)
                if array is None:
                    missing.append(path)
                    continue
                ours = (tuple(variable.shape), str(np.dtype(_dtype(variable))))
                theirs = (tuple(array.shape), str(array.dtype))
                if ours != theirs:
                    different.append(
                        f"{path}: checkpoint {theirs[0]} {theirs[1]}, model {ours[0]} {ours[1]}"
                    )
            extra.extend(f"{group}/{path}" for path in saved)
        if missing or extra or different:
            raise CheckpointMismatchError(where, missing, extra, different)

    def restore(self, tree: Mapping[str, Any], where: str, groups: Sequence[str] = GROUPS) -> None:
        """Gives every variable its saved value, or changes nothing.

        Args:
            tree: Nested dictionaries of arrays, by group.
            where: The checkpoint, for messages.
            groups: The groups to restore.

        Raises:
            CheckpointMismatchError: If paths, shapes or dtypes differ.
        """
        self.check(tree, where, groups)
        for group in groups:
            saved = dict(_flatten(tree.get(group) or {}))
            for variable in self.variables[group]:
                variable.assign(saved[variable.path])


def _dtype(variable: Any) -> Any:
    return variable.value.dtype if variable.value is not None else variable.dtype


def _put(branch: dict[str, Any], path: str, index: int) -> None:
    *folders, name = path.split("/")
    for folder in folders:
        branch = branch.setdefault(folder, {})
        if not isinstance(branch, dict):
            raise ValueError(f"The variable paths '{path}' and its beginning collide.")
    if name in branch:
        raise ValueError(
            f"The variable path '{path}' is found twice in the model. Give its layers unique names."
        )
    branch[name] = index


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[str, Any]] = tree.items()
    for name, value in items:
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
