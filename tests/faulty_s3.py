"""A proxy in front of an S3 or Azure server on this machine that injects faults: errors, resets, broken bodies, delays
and stalls.
"""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

#: Faults of requests. ``reset after`` and ``truncated`` happen after the server has executed the request.
KINDS = ("500", "503", "reset before", "reset after", "truncated", "delay", "stall")
_ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
}
_AZURE_ERRORS = _ERRORS | {"503": (503, "ServerBusy", "The server is currently unable to receive requests.")}
_HOP_HEADERS = {"connection", "content-length", "date", "expect", "server", "transfer-encoding"}


class FaultyS3(ThreadingHTTPServer):
    """
    Forwards requests to a server, and injects faults into a fraction of them.

    Parameters
    ----------
    target : str
        URL of the server, such as moto's.
    fraction : float
        The fraction of requests that get a fault; may be changed at any time.
    kinds : Sequence[str]
        Faults to choose from, of ``KINDS``.
    seed : int
        Seed of the choice; the order of requests still depends on threads.
    delay_seconds : float
        How long a delay is.
    stall_seconds : float
        How long a stalled connection stays open; longer than the reader waits.
    headers : Sequence[tuple[str, str]]
        Headers to add to responses of the server.
    concerns : Callable, optional
        Decides by method and path whether a request may get a fault; by default, all may.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        target: str,
        *,
        fraction: float,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        delay_seconds: float = 0.02,
        stall_seconds: float = 2.5,
        headers: Sequence[tuple[str, str]] = (),
        concerns: Callable[[str, str], bool] = lambda method, path: True,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.fraction, self.kinds, self.concerns = fraction, tuple(kinds), concerns
        self.delay_seconds, self.stall_seconds = delay_seconds, stall_seconds
        self.headers = list(headers)
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def choose(self, method: str, path: str) -> str:
        """Choose the fault of a request; empty for none."""
        with self._lock:
            self.requests[method] += 1
            if not self.concerns(method, path) or self._random.random() >= self.fraction:
                return ""
            kind = self._random.choice(self.kinds)
            self.injected[kind] += 1
            return kind

    def shutdown_request(self, request: Any) -> None:
        """Close a connection without shutting it down first, so that it can be reset."""
        self.close_request(request)

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that have closed their connection."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def answer(self) -> None:
        """Respond to a request, or inject a fault."""
        kind = self.server.choose(self.command, self.path)
        if kind == "reset before":
            return self.reset()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind in _ERRORS:
            is_azure = "x-ms-version" in self.headers
            status, code, message = (_AZURE_ERRORS if is_azure else _ERRORS)[kind]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            # A response to HEAD has no body, where Azure adds its code to the headers.
            headers = [("Content-Type", "application/xml"), ("x-ms-error-code", code)][: 2 if is_azure else 1]
            return self.send(status, headers, body.encode())
        if kind == "stall":
            self.server.closing.wait(self.server.stall_seconds)
            return self.reset()
        if kind == "delay":
            self.server.closing.wait(self.server.delay_seconds)
        status, headers, body = self.forward(data)
        # A response without a body cannot be truncated.
        if kind == "reset after" or (kind == "truncated" and not body):
            return self.reset()
        headers = headers + self.server.headers
        self.send(status, headers, body, n_sent=len(body) // 2 if kind == "truncated" else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def forward(self, data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Forward a request and read the whole response."""
        connection = http.client.HTTPConnection(self.server.target)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_HEADERS:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        response = connection.getresponse()
        body, headers = response.read(), response.getheaders()
        connection.close()
        return response.status, [(name, value) for name, value in headers if name.lower() != "connection"], body

    def send(self, status: int, headers: list[tuple[str, str]], body: bytes, *, n_sent: int | None = None) -> None:
        """Send a response, or the beginning of one."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        # The response to HEAD gives the length of an object that is not sent.
        lengths = [value for name, value in headers if name.lower() == "content-length" and self.command == "HEAD"]
        self.send_header("Content-Length", lengths[0] if lengths else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:n_sent])
        if n_sent is not None:
            self.close_connection = True

    def reset(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def open_faulty_s3(target: str, *, fraction: float, **settings: Any) -> Iterator[FaultyS3]:
    """Run a proxy in threads of this process; the settings are those of `FaultyS3`."""
    with FaultyS3(target, fraction=fraction, **settings) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            proxy.shutdown()
            thread.join()
