"""The proxy of the loopback Azure, through which clients send their requests, and the faults that it injects."""

import contextlib
import io
import json
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from loopback_azure import LoopbackAzure


class Call(NamedTuple):
    """A request to Resource Manager."""

    caller: str
    method: str
    kind: str
    name: str


@dataclass
class Refusal:
    """Refuse requests for resources of a kind whose name matches a pattern, ``count`` times (None: always)."""

    kind: str
    code: str
    status: int = 409
    name: str = ""
    method: str = "PUT"
    count: int | None = None

    def strikes(self, method: str, kind: str, name: str) -> bool:
        """Count a request, and return whether it is refused."""
        if (method, kind) != (self.method, self.kind) or not re.search(self.name, name) or self.count == 0:
            return False
        if self.count is not None:
            self.count -= 1
        return True


@dataclass
class Faults:
    """The injected faults; a test may change them at any time."""

    never_boots: set[str] = field(default_factory=set)  # roles: "scheduler", "worker"
    unpullable: set[str] = field(default_factory=set)  # docker images
    refusals: list[Refusal] = field(default_factory=list)
    may_delete: bool = True


class ServerError(Exception):
    """An error that the server reports."""

    def __init__(self, status: int, code: str, message: str = "refused by the loopback Azure") -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"code": code, "message": message}}


class _Handler(BaseHTTPRequestHandler):
    """Responds to requests, sent to the proxy itself or through a tunnel."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Server"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_CONNECT(self) -> None:
        """Continue in TLS, as the requested host."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = io.BufferedWriter(self.connection.makefile("wb", buffering=0))  # type: ignore[assignment,arg-type]
        self.close_connection = False

    def finish(self) -> None:
        """Close the whole connection; the client may have closed it already."""
        for part in (self.wfile, self.rfile, self.connection):
            with contextlib.suppress(OSError, ValueError):
                part.close()

    def respond(self) -> None:
        """Respond to a request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        host = urlsplit(self.path).hostname or self.headers.get("Host", "")
        try:
            status, content, headers = self.server.cloud.respond(host, self.command, self.path, self.headers, body)
        except ServerError as error:
            status, content, headers = error.status, error.body, {}
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    do_GET = do_PUT = do_DELETE = do_POST = respond


class _Server(ThreadingHTTPServer):
    """The proxy."""

    daemon_threads = True

    def __init__(self, cloud: "LoopbackAzure", certificate: str, key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cloud = cloud
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that have closed their connection."""


@contextlib.contextmanager
def serve(cloud: "LoopbackAzure", certificate: str, key: str) -> Iterator[int]:
    """Serve on a free port of 127.0.0.1; yield the port."""
    with _Server(cloud, certificate, key) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
