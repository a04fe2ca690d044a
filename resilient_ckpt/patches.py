"""Attributes set on objects of others for a time, and put back."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Patches:
    """Sets instance attributes and undoes that in reverse order.

    The instance's `__dict__` is written directly: Keras' `__setattr__` would track what is
    meant to be temporary.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute for now.

        Args:
            owner: The object.
            name: The attribute.
            value: Its value for now.
        """
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = value

    def undo(self) -> None:
        """Puts everything back. May be called twice."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value
