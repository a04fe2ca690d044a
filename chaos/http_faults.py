"""An HTTP proxy that makes the server behind it fail as servers on a network do."""

from __future__ import annotations

import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass
class HttpFaults:
    """What goes wrong; may be changed while the proxy runs.

    Attributes:
        errors: Share of the requests answered by one of `statuses`, without being passed on.
        statuses: The HTTP status codes of such answers.
        resets: Share of the answers broken off in the middle by a reset of the connection.
        truncations: Share of the answers that end too early, the connection being closed.
        seconds: Longest delay of an answer, in seconds.
        outage: Whether every connection is reset at once.
    """

    errors: float = 0.0
    statuses: tuple[int, ...] = (500, 503, 429)
    resets: float = 0.0
    truncations: float = 0.0
    seconds: float = 0.0
    outage: bool = False


class FaultProxy:
    """Passes HTTP requests on, and spoils some, while the `with` block runs.

    Args:
        port: The server's port on this machine.
        faults: What goes wrong.
        seed: Which requests it hits.
    """

    def __init__(self, port: int, faults: HttpFaults, seed: int = 0) -> None:
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self._upstream = port
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._server.server_address[1]
        return port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _draw(self) -> tuple[str, int, float]:
        """What becomes of a request: the fault, a status, and a delay in seconds."""
        faults = self.faults
        with self._lock:
            value = self._chance.random()
            status = self._chance.choice(faults.statuses)
            delay = self._chance.random() * faults.seconds
            fault = "passed"
            if faults.outage:
                fault = "outage"
            else:
                for name in ("errors", "resets", "truncations"):
                    share = getattr(faults, name)
                    if value < share:
                        fault = name
                        break
                    value -= share
            self.counts[fault] += 1
        return fault, status, delay

    def _pass_on(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is nothing to report."""


def _handler_of(proxy: FaultProxy) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            fault, status, delay = proxy._draw()
            if fault == "outage":
                self._reset()
                return
            body = self._body()
            time.sleep(delay)
            if fault == "errors":
                self._answer(status, [], b"<Error><Code>InternalError</Code></Error>")
                return
            headers = [(n, v) for n, v in self.headers.items() if n.lower() != "transfer-encoding"]
            if not any(name.lower() == "content-length" for name, _ in headers) and body:
                headers.append(("Content-Length", str(len(body))))
            code, answered, content = proxy._pass_on(self.command, self.path, headers, body)
            if fault == "passed" or not content:
                self._answer(code, answered, content)
                return
            self._answer(code, answered, content, sent=len(content) // 2)
            if fault == "resets":
                self._reset()
            else:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = bytearray()
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return bytes(parts)
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def handle_expect_100(self) -> bool:
            return True  # answered when the body is read

        def _answer(
            self, code: int, headers: list[tuple[str, str]], content: bytes, sent: int | None = None
        ) -> None:
            self.send_response_only(code)
            lengths = [v for n, v in headers if n.lower() == "content-length"]
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            # The answer to HEAD states a length, and has no content.
            length = lengths[0] if self.command == "HEAD" and lengths else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])
            self.wfile.flush()

        def _reset(self) -> None:
            self.close_connection = True
            # With no time to linger, closing sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    return Handler
