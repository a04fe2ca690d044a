"""Which storage errors pass by themselves, and how long to wait for that."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import tenacity

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    Judged by the innermost operating-system error: Orbax and TensorStore wrap what
    really happened.

    Args:
        error: What was raised.

    Returns:
        True for interrupted, overloaded or disconnected storage; false for a full disk,
        missing permissions and everything that is not an operating-system error.
    """
    numbers = [cause.errno for cause in _causes(error) if isinstance(cause, OSError)]
    if numbers:
        return numbers[-1] in TRANSIENT_ERRNOS
    return False


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, within a time budget.

    Args:
        budget_seconds: No new attempt begins later than this after the first one.
        first_wait_seconds: The longest wait before the second attempt; it doubles from
            attempt to attempt.
        max_wait_seconds: The longest wait between two attempts.
    """

    budget_seconds: float = 60.0
    first_wait_seconds: float = 0.2
    max_wait_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("budget_seconds", "first_wait_seconds", "max_wait_seconds"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"`{name}` must be a number of seconds >= 0, got {value!r}.")

    def run(
        self,
        attempt: Callable[[], Result],
        what: str,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Result:
        """Calls `attempt` until it succeeds, fails for good, or the budget is spent.

        Args:
            attempt: The call.
            what: What it does, for the log.
            sleep: Waits some seconds; for tests.

        Returns:
            What `attempt` returned.

        Raises:
            Exception: The last error of `attempt`.
        """

        def log(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            logger.warning(
                "%s failed (attempt %d): %s", what, state.attempt_number, state.outcome.exception()
            )

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(
                multiplier=self.first_wait_seconds, max=self.max_wait_seconds
            ),
            stop=tenacity.stop_before_delay(self.budget_seconds),
            before_sleep=log,
            reraise=True,
            sleep=sleep,
        )
        return retrying(attempt)
