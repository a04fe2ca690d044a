"""Which storage errors pass by themselves, and how long to wait for that."""

from __future__ import annotations

import errno
import http.client
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

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

_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})

# Error codes of S3 that come with a status of 400, or with none
# (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
_TRANSIENT_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)

# What HTTP libraries raise when a connection fails, or brings damaged content, by name, since
# none of them need be installed: botocore, aiohttp, requests, urllib3, httpx, azure-core, fsspec.
_CONNECTION_ERRORS = frozenset(
    {
        "ClientConnectionError",
        "ClientPayloadError",
        "FSTimeoutError",
        "FlexibleChecksumError",
        "HTTPClientError",
        "HTTPException",
        "IncompleteReadError",
        "ProtocolError",
        "ResponseStreamingError",
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
    }
)

# TensorStore raises ValueError, with the cause in its text.
_OS_ERROR_TEXT = re.compile(r"os_error_code='(\d+)'")
_HTTP_TEXT = re.compile(r"HTTP response code: (\d+)")
_TRANSIENT_STATUS = re.compile(r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    Orbax, TensorStore and fsspec wrap what really happened; the cause that an error names
    counts more than the error itself.

    Args:
        error: What was raised.

    Returns:
        True for interrupted, overloaded or disconnected storage: EIO, ESTALE, ETIMEDOUT and
        the like, HTTP 408, 425, 429 and 5xx (but 501), lost connections. False for a full disk,
        missing permissions, bad credentials, a bucket that is not there, and everything
        that is not an error of the storage.
    """
    return bool(_judge(error, _transience))


def is_out_of_space(error: BaseException) -> bool:
    """Whether a full disk, or an exhausted quota, is the cause.

    Args:
        error: What was raised.

    Returns:
        Whether deleting something may help.
    """
    number = _judge(error, _errno_of)
    return number in _SPACE_ERRNOS


def _judge(error: BaseException, opinion: Callable[[BaseException], Any]) -> Any:
    """The first opinion, going from causes to what they caused."""
    cause = error.__cause__
    found = _judge(cause, opinion) if cause is not None else None
    if found is None:
        found = opinion(error)
    if found is None and cause is None and error.__context__ is not None:
        found = _judge(error.__context__, opinion)
    return found


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _OS_ERROR_TEXT.search(str(error))
    return int(found[1]) if found else None


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
    for name in ("status", "status_code", "code"):
        if not isinstance(status, int):
            status = getattr(error, name, None)
    if not isinstance(status, int):
        found = _HTTP_TEXT.search(str(error))
        status = int(found[1]) if found else None
    return status if status is not None and 100 <= status <= 599 else None


def _transience(error: BaseException) -> bool | None:
    """True, false, or `None` where the error does not say."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
    if code in _TRANSIENT_CODES:
        return True
    status = _http_status(error)
    if status is not None and status >= 400:
        # 501 and 505: the server does not know what was asked for, and will not learn it.
        return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
    number = _errno_of(error)
    if number is not None:
        return number in TRANSIENT_ERRNOS
    if isinstance(error, ConnectionError | TimeoutError | http.client.HTTPException):
        return True
    if any(kind.__name__ in _CONNECTION_ERRORS for kind in type(error).__mro__):
        return True
    return True if _TRANSIENT_STATUS.match(str(error)) else None


class _OutOfTime(tenacity.stop.stop_base):
    def __init__(self, time_left: Callable[[], float]) -> None:
        self._time_left = time_left

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return retry_state.upcoming_sleep >= self._time_left()


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
            if not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"`{name}` must be a number of seconds >= 0, got {value!r}.")

    def run(
        self,
        attempt: Callable[[], Result],
        what: str,
        sleep: Callable[[float], None] = time.sleep,
        time_left: Callable[[], float] = lambda: math.inf,
    ) -> Result:
        """Calls `attempt` until it succeeds, fails for good, or the time is up.

        Every failure that is retried is logged at WARNING.

        Args:
            attempt: The call.
            what: What it does, for the log.
            sleep: Waits some seconds.
            time_left: Seconds after which no further attempt begins, whatever the budget
                is; asked again and again.

        Returns:
            What `attempt` returned.

        Raises:
            Exception: The last error of `attempt`.
        """

        def log(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            logger.warning(
                "%s failed (attempt %d, next in %.1f s): %s",
                what,
                state.attempt_number,
                state.upcoming_sleep,
                state.outcome.exception(),
            )

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(
                multiplier=self.first_wait_seconds, max=self.max_wait_seconds
            ),
            stop=tenacity.stop_before_delay(self.budget_seconds) | _OutOfTime(time_left),
            before_sleep=log,
            reraise=True,
            sleep=sleep,
        )
        return retrying(attempt)
