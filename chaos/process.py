"""A training process under test: started, watched through its output, killed, started again."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self


class TrainingProcess:
    """Runs a command and reads what it prints, line by line.

    Args:
        command: The command and its arguments.
        environment: Variables to set besides the present ones.
        echo: Takes every line as it is printed.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.lines: list[str] = []
        self._unread: collections.deque[str] = collections.deque()
        self._echo = echo
        self._printed = threading.Condition()
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def wait_for_line(self, wanted: Callable[[str], bool], timeout: float = 120.0) -> str:
        """Waits for a line that was not waited for before.

        Args:
            wanted: Says whether it is the line.
            timeout: Seconds.

        Returns:
            The line.

        Raises:
            TimeoutError: If it is not printed in time, or the process ends without it.
        """
        end = time.monotonic() + timeout
        with self._printed:
            while True:
                while self._unread:
                    line = self._unread.popleft()
                    if wanted(line):
                        return line
                ended = not self._reader.is_alive()
                left = end - time.monotonic()
                if ended or left <= 0:
                    why = "The process ended" if ended else f"{timeout} s passed"
                    raise TimeoutError(f"{why} before the line; it printed:\n{self.output()}")
                self._printed.wait(min(left, 0.1))

    def send(self, number: int) -> None:
        """Sends a signal to the process, and to it alone."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 240.0) -> int:
        """Waits for the end.

        Args:
            timeout: Seconds.

        Returns:
            The exit code; minus the signal's number if a signal ended it.

        Raises:
            TimeoutError: If it does not end in time; it is killed then.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"No end after {timeout} s; it printed:\n{self.output()}") from None
        self._reader.join()
        return code

    def kill(self) -> None:
        """Kills the process with SIGKILL, and waits for its end."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        """All that was printed so far."""
        return "\n".join(self.lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.rstrip("\n")
            self._echo(line)
            with self._printed:
                self.lines.append(line)
                self._unread.append(line)
                self._printed.notify_all()
