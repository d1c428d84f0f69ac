"""The server of the loopback EC2, in front of moto: it records requests, and injects faults."""

import base64
import binascii
import contextlib
import ipaddress
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from machines import read_plan
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

if TYPE_CHECKING:
    from loopback_ec2 import LoopbackEC2

# botocore retries 5xx, which EC2 also returns if capacity is insufficient.
_STATUS = {
    "AuthFailure": 401,
    "UnauthorizedOperation": 403,
    "InsufficientInstanceCapacity": 500,
    "InternalError": 500,
    "RequestLimitExceeded": 503,
    "Unavailable": 503,
}

_BUCKET_PARTS = set("acl encryption location policy tagging uploads versioning versions".split())


class Call(NamedTuple):
    """A request that reached the server."""

    service: str
    action: str
    summary: str


@dataclass
class Refusal:
    """Refuse ``count`` calls (None: all) of an action, after accepting ``skip`` of them."""

    code: str = "InsufficientInstanceCapacity"
    action: str = "RunInstances"
    role: str | None = None
    is_spot: bool | None = None
    skip: int = 0
    count: int | None = None
    message: str = "refused by the loopback EC2"
    status: int | None = None

    def concerns(self, action: str, form: dict[str, str]) -> bool:
        """Whether the refusal applies to this call."""
        if action != self.action:
            return False
        if self.is_spot is not None and self.is_spot != (form.get("InstanceMarketOptions.MarketType") == "spot"):
            return False
        return self.role is None or self.role == _read_role(form)

    def strikes(self) -> bool:
        """Count a call, and return whether it is refused."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.count is None:
            return True
        self.count -= 1
        return self.count >= 0


@dataclass
class Faults:
    """The injected faults; a test may change them at any time."""

    boot_delay_seconds: float = 0.0
    never_boots: set[str] = field(default_factory=set)  # roles: "scheduler", "worker"
    unpullable: set[str] = field(default_factory=set)  # docker images
    refusals: list[Refusal] = field(default_factory=list)


def _read_role(form: dict[str, str]) -> str:
    """Read the role of the instance that a call launches."""
    try:
        return read_plan(base64.b64decode(form.get("UserData", "")).decode()).role
    except (binascii.Error, UnicodeDecodeError):
        return "other"


class _QuietHandler(MotoRequestHandler):
    """A handler that does not print each request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Print nothing."""


class _Gateway:
    """A WSGI application that passes requests on to moto, and blocks addresses that moto has made up."""

    def __init__(self, cloud: "LoopbackEC2") -> None:
        self.cloud = cloud
        self.moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Respond to a request."""
        credential = re.search(r"Credential=([^/,]+)/\d+/[^/]*/([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        if not credential and environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
            return _send(401, _render_error("AuthFailure", "the request is not signed"), start_response)
        caller, service = credential.groups() if credential else ("", "s3")
        if service == "s3":
            call = _name_s3_call(environ)
            if call.action == "CreateBucket" and call.summary not in s3_backends.bucket_accounts:
                self.cloud.buckets.add(call.summary)
            self.cloud.note(caller, call)
            return self.moto(environ, start_response)
        form = _read_form(environ)
        action = form.pop("Action", environ.get("PATH_INFO", ""))
        shown = " ".join(
            f"{name}={value}" for name, value in sorted(form.items()) if name not in ("UserData", "Version")
        )
        self.cloud.note(caller, Call(service, action, shown))
        if service != "ec2":
            return self.moto(environ, start_response)
        return self._answer_ec2(action, form, environ, start_response)

    def _answer_ec2(
        self, action: str, form: dict[str, str], environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Respond to a request to EC2."""
        refusal = self.cloud.find_refusal(action, form)
        if refusal is not None:
            status = refusal.status or _STATUS.get(refusal.code, 400)
            body = _render_error(refusal.code, refusal.message)
        elif action in ("StopInstances", "StartInstances", "RebootInstances"):
            status, body = 400, _render_error("UnsupportedOperation", f"the loopback EC2 does not support {action}")
        else:
            status, body = self._ask_moto(environ)
            self.cloud.power_on()
        return _send(status, body, start_response)

    def _ask_moto(self, environ: dict[str, Any]) -> tuple[int, bytes]:
        """Return moto's response without made-up host names, or an error if it contains made-up addresses."""
        statuses = []
        with contextlib.closing(self.moto(environ, lambda status, *_: statuses.append(status))) as parts:
            body = b"".join(parts)
        body = re.sub(rb"<(\w*[dD]nsName)>[^<]*</\1>", rb"<\1/>", body)
        if made_up := find_foreign_addresses(body.decode(), self.cloud.network):
            self.cloud.leaks += made_up
            return 400, _render_error("LoopbackLeak", f"the response contained addresses of other machines: {made_up}")
        return int(statuses[0].split()[0]), body


def find_foreign_addresses(document: str, network: str) -> list[str]:
    """Find the IP addresses in an XML document that are outside a network, given by its first three numbers."""
    own = ipaddress.ip_network(f"{network}.0/24")
    found = []
    for text in re.findall(r">\s*([0-9a-fA-F:.]+)\s*<", document):
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(text) not in own:
                found.append(text)
    return found


def _render_error(code: str, message: str) -> bytes:
    """Render an error as EC2 does."""
    error = f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message></Error>"
    return f"<Response><Errors>{error}</Errors><RequestID>{uuid.uuid4()}</RequestID></Response>".encode()


def _send(status: int, body: bytes, start_response: Callable[..., Any]) -> list[bytes]:
    """Send an XML document."""
    headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))]
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return [body]


def _read_form(environ: dict[str, Any]) -> dict[str, str]:
    """Read the parameters of a request, and rewind its body."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = BytesIO(body)
    fields = parse_qs(body.decode(errors="replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}


def _name_s3_call(environ: dict[str, Any]) -> Call:
    """Name the S3 operation of a request."""
    bucket, _, key = environ["PATH_INFO"].encode("latin-1").decode(errors="replace").lstrip("/").partition("/")
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    method = environ["REQUEST_METHOD"]
    if key:
        return Call("s3", _name_object_call(method, query, environ), f"{bucket}/{key}")
    if method == "GET" and bucket:
        others = _BUCKET_PARTS & query.keys()
        listing = "ListObjectsV2" if "list-type" in query else "ListObjects"
        action = "GetBucket" + others.pop().title() if others else listing
        prefix = query.get("prefix", [""])[0]
        return Call("s3", action, f"{bucket}/{prefix}" if prefix else bucket)
    if method == "POST":
        return Call("s3", "DeleteObjects" if "delete" in query else "PostObject", bucket)
    if method == "PUT" and query:
        return Call("s3", "PutBucket" + next(iter(query)).title(), bucket)
    actions = {"GET": "ListBuckets", "PUT": "CreateBucket", "HEAD": "HeadBucket", "DELETE": "DeleteBucket"}
    return Call("s3", actions.get(method, method), bucket)


def _name_object_call(method: str, query: dict[str, list[str]], environ: dict[str, Any]) -> str:
    """Name the S3 operation of a request about an object."""
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
    if "uploadId" in query:
        return {"PUT": "UploadPart", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}.get(method, method)
    if method == "PUT" and "HTTP_X_AMZ_COPY_SOURCE" in environ:
        return "CopyObject"
    return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}.get(method, method)


@contextlib.contextmanager
def serve(cloud: "LoopbackEC2") -> Iterator[str]:
    """Serve on a free port of 127.0.0.1; yield the URL."""
    server = make_server("127.0.0.1", 0, _Gateway(cloud), threaded=True, request_handler=_QuietHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
