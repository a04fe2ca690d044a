"""What the processes of a run tell each other, over JAX's own coordination service."""

from __future__ import annotations

import itertools
import time
from typing import Any

from resilient_ckpt.errors import HostsMissingError

AGREE_SECONDS = 300.0
"""How long one process waits for the others."""

_rounds = itertools.count()


class Hosts:
    """The processes of a run: this one alone, or those of `jax.distributed`.

    Every process makes the same calls in the same order.

    Args:
        client: JAX's client of the coordination service; `None` for a single process.
        index: This process.
        count: How many there are.
        seconds: How long to wait for the others; `AGREE_SECONDS` by default.
    """

    def __init__(
        self, client: Any = None, index: int = 0, count: int = 1, seconds: float | None = None
    ) -> None:
        self.index = index
        self.count = count
        self._client = client
        self._seconds = AGREE_SECONDS if seconds is None else seconds

    @property
    def first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0

    def exchange(self, what: str, value: str = "") -> list[str]:
        """Tells all processes a value and waits for theirs; so it is a barrier, too.

        Args:
            what: What it is about, for the error.
            value: This process's value.

        Returns:
            The values of all, by index.

        Raises:
            HostsMissingError: If some do not come in time.
        """
        if self.count == 1:
            return [value]
        key = f"resilient_ckpt/{next(_rounds)}"
        self._client.key_value_set(f"{key}/{self.index}", value)
        end = time.monotonic() + self._seconds
        values: list[str] = []
        missing: list[int] = []
        for index in range(self.count):
            left = max(end - time.monotonic(), 0.05)
            try:
                values.append(
                    self._client.blocking_key_value_get(f"{key}/{index}", int(left * 1000))
                )
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                missing.append(index)
        if missing:
            raise HostsMissingError(what, missing, self.count, self._seconds)
        return values


def hosts() -> Hosts:
    """The processes of this run, as `jax.distributed.initialize` has joined them."""
    # The public functions would start JAX's backends, after which it cannot be initialized.
    from jax._src import distributed

    state = distributed.global_state
    if state.client is None:
        return Hosts()
    return Hosts(state.client, state.process_id, state.num_processes)
