"""A simulated EC2 on this machine whose instances really run, to test a cluster launcher without a cloud.

A moto server answers for EC2, S3, IAM and STS on 127.0.0.1. Each instance gets its own loopback address. When it boots,
it runs the ``docker run`` line of its user data as a process of this machine, with this interpreter in place of the
image's. So an unmodified ``dask_cloudprovider.aws.EC2Cluster`` starts real schedulers and workers, which talk to each
other and to the client over TLS. The user data pass through YAML and a real shell, as on a real instance, so wrong
quoting fails here, too.

It does not simulate images, docker, the bootstrap by apt, GPU drivers, security groups, IAM policies, the metadata
service, quotas and real latency. It accepts any credentials, unless ``needs_profile``. Processes share the memory, disk
and interpreter of this machine. It answers at once and consistently, whereas the real EC2 does not know a new instance
for a while.

Linux only, because all addresses of 127.0.0.0/8 must belong to this machine. Each scheduler listens on port 8786 of its
own address, so nothing may listen on that port of all addresses. There can be one simulator per process, because moto's
state is global.
"""

import base64
import binascii
import contextlib
import copy
import ipaddress
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from unittest import mock
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

import boto3
import dask.config
import pytest
from machines import Container, build_environment, find_processes, localize, read_plan, reserve_network
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.ec2.models.amis import Ami
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES
from moto.ec2.models.instances import Instance, InstanceBackend, InstanceState, StateReason
from moto.iam.models import iam_backends
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from fruitdask.core.s3 import S3

MAX_USER_DATA_BYTES = 16_384
CANONICAL = "099720109477"
ALIVE = ("pending", "running")

# fsspec caches file systems by their options; here also by endpoint, or they would call a server that is gone. They are
# kept until the process ends, because unclosed clients warn when they are collected.
_file_systems: dict[str, dict[str, Any]] = defaultdict(dict)

# botocore retries 5xx, which EC2 also answers where it lacks capacity.
_STATUS = {
    "AuthFailure": 401,
    "UnauthorizedOperation": 403,
    "InsufficientInstanceCapacity": 500,
    "InternalError": 500,
    "RequestLimitExceeded": 503,
    "Unavailable": 503,
}

_STATE_CODES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}
_REASONS = {
    "user": ("Client.UserInitiatedShutdown", "User initiated shutdown"),
    "instance": ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown"),
    "spot": ("Server.SpotInstanceTermination", "Spot instance termination"),
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
        """Whether it is about this call."""
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
    """Injected faults; may be changed at any time."""

    boot_delay_seconds: float = 0.0
    never_boots: set[str] = field(default_factory=set)  # roles: "scheduler", "worker"
    unpullable: set[str] = field(default_factory=set)  # docker images
    refusals: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class LoopbackInstance:
    """A snapshot of an instance."""

    id: str
    role: str
    instance_type: str
    is_spot: bool
    tags: dict[str, str]
    user_data: str
    address: str
    launched_at: datetime
    state: str
    state_reason: str
    image: str


def _read_role(form: dict[str, str]) -> str:
    """Read the role of the instance that a call launches."""
    try:
        return read_plan(base64.b64decode(form.get("UserData", "")).decode()).role
    except (binascii.Error, UnicodeDecodeError):
        return "other"


class _Machine:
    """The life of an instance of moto."""

    def __init__(self, cloud: "LoopbackEC2", instance: Instance) -> None:
        self.cloud = cloud
        self.instance = instance
        self.user_data = instance.user_data.decode() if instance.user_data else ""
        self.plan = read_plan(self.user_data)
        self.folder = cloud.folder / instance.id
        self.ending: str | None = None
        self.container: Container | None = None
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._live, name=instance.id, daemon=True)]

    @property
    def log_path(self) -> Path:
        """File with the output of its processes."""
        return self.folder / "log.txt"

    def describe(self) -> LoopbackInstance:
        """Take a snapshot."""
        instance = self.instance
        return LoopbackInstance(
            id=instance.id,
            role=self.plan.role,
            instance_type=instance.instance_type,
            is_spot=instance.lifecycle == "spot",
            tags={tag["key"]: tag["value"] for tag in instance.get_tags()},
            user_data=self.user_data,
            address=instance.private_ip or "",
            launched_at=instance.launch_time.replace(tzinfo=UTC),
            state=instance.state,
            state_reason=instance.state_reason.code,
            image=self.plan.image,
        )

    def power_on(self) -> None:
        """Start to run."""
        with self.cloud.changed:
            if self.ending is None:
                self.folder.mkdir()
                self._threads[0].start()

    def power_off(self, ending: str) -> None:
        """End, for the first reason given."""
        with self.cloud.changed:
            if self.ending is not None:
                return
            self.ending = ending
            if ending == "instance" and self.instance.instance_initiated_shutdown_behavior == "stop":
                self._set_state("stopping")
            else:
                self.cloud.originals["terminate"](self.instance)
                self._set_state("shutting-down")
            for nic in self.instance.nics.values():
                nic.public_ip = None
        self._over.set()

    def join(self, timeout: float) -> None:
        """Wait until its threads have ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout)

    def _set_state(self, name: str) -> None:
        """Set the state in moto, and notify all waiting threads."""
        with self.cloud.changed:
            self.instance._state = InstanceState(name, _STATE_CODES[name])
            if self.ending is not None:
                code, message = _REASONS[self.ending]
                self.instance.state_reason = StateReason(f"{code}: {message}", code)
            self.cloud.changed.notify_all()

    def _live(self) -> None:
        """Boot, wait for any end, and clean up."""
        with self.cloud.changed:
            if self.ending is None:
                self._set_state("running")
                if self.cloud.wants_public.get(self.instance.id):
                    self.instance.nics[0].public_ip = self.instance.private_ip
        if not self._over.wait(self.cloud.faults.boot_delay_seconds):
            self._boot()
        self._clean_up()

    def _boot(self) -> None:
        """Follow the user data."""
        if self.plan.role in self.cloud.faults.never_boots:
            self._over.wait()
            return
        if self.plan.problem:
            self.log_path.write_text(self.plan.problem + "\n")
        self._run_docker()
        minutes = self.plan.lifetime_minutes
        if not self._over.wait(None if minutes is None else minutes * self.cloud.seconds_per_minute):
            self.power_off("instance")

    def _run_docker(self) -> None:
        """Run the command of the container, unless its image cannot be pulled."""
        if self.plan.image in self.cloud.faults.unpullable:
            self.log_path.write_text(f"docker: cannot pull the image '{self.plan.image}'\n")
        elif self.plan.command:
            self.container = self._start()
            watch = threading.Thread(target=self._watch, args=(self.container,), name=self.instance.id, daemon=True)
            self._threads.append(watch)
            watch.start()
            return
        if self.plan.shuts_down:
            self.power_off("instance")

    def _start(self) -> Container:
        """Start the container's command in an empty folder."""
        for name in ("cwd", "home", "tmp"):
            (self.folder / name).mkdir()
        return Container(
            localize(self.plan.command, self.instance.private_ip or ""),
            folder=self.folder / "cwd",
            log=self.log_path,
            environment=self._build_environment(),
        )

    def _build_environment(self) -> dict[str, str]:
        """Build the environment of the container; variables of the user data win."""
        environment = build_environment(self.folder)
        environment |= self.cloud.build_environment(self.instance.id, has_credentials=self._has_credentials())
        return environment | self.plan.variables

    def _has_credentials(self) -> bool:
        """Whether the metadata service would hand out credentials."""
        profiles = self.instance.ec2_backend.iam_instance_profile_associations
        return not self.cloud.needs_profile or self.instance.id in profiles

    def _watch(self, container: Container) -> None:
        """Wait until the container ends, and continue as cloud-init would."""
        container.wait()
        container.kill()
        if self.plan.shuts_down:
            self.power_off("instance")

    def _clean_up(self) -> None:
        """End all of its processes."""
        if self.container is not None:
            if self.ending != "spot" and not self.cloud.is_closing:
                self.container.stop(self.cloud.grace_seconds)
            self.container.kill()
            self._threads[-1].join()
            self.container.close()
        with self.cloud.changed:
            self._set_state("stopped" if self.instance.state == "stopping" else "terminated")


class _QuietHandler(MotoRequestHandler):
    """Handler that does not print each request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Print nothing."""


class _Gateway:
    """WSGI application in front of moto: records requests, injects faults, and blocks made-up addresses."""

    def __init__(self, cloud: "LoopbackEC2") -> None:
        self.cloud = cloud
        self.moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
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
        """Answer for EC2."""
        refusal = self.cloud.find_refusal(action, form)
        if refusal is not None:
            status = refusal.status or _STATUS.get(refusal.code, 400)
            body = _render_error(refusal.code, refusal.message)
        elif action in ("StopInstances", "StartInstances", "RebootInstances"):
            status, body = 400, _render_error("UnsupportedOperation", f"the loopback EC2 does not know {action}")
        else:
            status, body = self._ask_moto(environ)
            self.cloud.power_on()
        return _send(status, body, start_response)

    def _ask_moto(self, environ: dict[str, Any]) -> tuple[int, bytes]:
        """Return the answer of moto without made-up host names, or an error if it contains made-up addresses."""
        answered = []
        with contextlib.closing(self.moto(environ, lambda status, *_: answered.append(status))) as parts:
            body = b"".join(parts)
        body = re.sub(rb"<(\w*[dD]nsName)>[^<]*</\1>", rb"<\1/>", body)
        if made_up := find_foreign_addresses(body.decode(), self.cloud.network):
            self.cloud.leaks += made_up
            return 400, _render_error("LoopbackLeak", f"the answer held addresses of other machines: {made_up}")
        return int(answered[0].split()[0]), body


def find_foreign_addresses(document: str, network: str) -> list[str]:
    """Find the IP addresses in an XML document outside of a network, given by its first three numbers."""
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
    """Name the S3 operation on an object."""
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
    if "uploadId" in query:
        return {"PUT": "UploadPart", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}.get(method, method)
    if method == "PUT" and "HTTP_X_AMZ_COPY_SOURCE" in environ:
        return "CopyObject"
    return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}.get(method, method)


class LoopbackEC2:
    """Simulated EC2, S3, IAM and STS on this machine, whose instances are processes.

    ``seconds_per_minute`` is how long a minute of ``shutdown -h +N`` in the user data lasts. With ``needs_profile``
    only instances launched with an instance profile have credentials.
    """

    def __init__(
        self,
        *,
        boot_delay_seconds: float = 0.0,
        seconds_per_minute: float = 60.0,
        grace_seconds: float = 0.5,
        needs_profile: bool = False,
        region: str = "eu-west-1",
    ) -> None:
        self.faults = Faults(boot_delay_seconds=boot_delay_seconds)
        self.seconds_per_minute = seconds_per_minute
        self.grace_seconds = grace_seconds
        self.needs_profile = needs_profile
        self.region = region
        self.is_closing = False
        self.changed = threading.Condition(threading.RLock())
        self.originals: dict[str, Callable[..., Any]] = {}
        self.buckets: set[str] = set()
        self.leaks: list[str] = []
        self.wants_public: dict[str, bool] = {}
        self._notes: list[tuple[str, Call]] = []
        self._machines: dict[str, _Machine] = {}
        self._asleep: list[_Machine] = []
        self._n_addresses = 1
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start the server."""
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="loopback-ec2-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.network = stack.enter_context(reserve_network())
            stack.enter_context(self._own_moto())
            self.endpoint_url = stack.enter_context(self._serve())
            stack.callback(self._power_everything_off)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all instances, and forget everything."""
        if error is not None:
            for machine in self._machines.values():
                log = self.log(machine.instance.id)
                error.add_note(f"{machine.plan.role} {machine.instance.id}:\n{log[-3000:]}")
        self._stack.close()
        _disarm_clusters()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make AWS clients talk to this server only."""
        return self.build_environment("client", has_credentials=True)

    @property
    def calls(self) -> list[Call]:
        """The requests so far."""
        return [call for _, call in list(self._notes)]

    def calls_by(self, name: str) -> list[Call]:
        """Return the requests so far of an instance, by its id, or of the client of a cluster, by "client"."""
        return [call for caller, call in list(self._notes) if caller == _name_key(name)]

    def build_environment(self, caller: str, *, has_credentials: bool) -> dict[str, str]:
        """Build the variables of a named AWS client."""
        environment = {
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        # Variables of a service, which the developer may have set, take precedence over the general one.
        for suffix in ("", "_EC2", "_S3", "_IAM", "_STS"):
            environment["AWS_ENDPOINT_URL" + suffix] = self.endpoint_url
        if has_credentials:
            environment |= {"AWS_ACCESS_KEY_ID": _name_key(caller), "AWS_SECRET_ACCESS_KEY": "loopback"}
        return environment

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Make all AWS clients of this process and its children talk to this server, and poll it often."""
        patch.setattr("fruitdask.cluster.cloud.cluster.CloudCluster.poll_seconds", 0.1)
        patch.setattr("fruitdask.cluster.ec2.instances._POLL_SECONDS", 0.1)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in self.environment.items():
            patch.setenv(name, value)
        patch.setattr(S3, "_cache", _file_systems[self.endpoint_url])

    @contextlib.contextmanager
    def client(self, service: str, **options: Any) -> Iterator[Any]:
        """Open a boto3 client of this server, whatever the environment is."""
        client = boto3.client(
            service,
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=_name_key("test"),
            aws_secret_access_key="loopback",
            **options,
        )
        with contextlib.closing(client):
            yield client

    def instances(self, states: Collection[str] | None = ALIVE) -> list[LoopbackInstance]:
        """List the instances in some states (None: any), in the order of launch."""
        with self.changed:
            described = [machine.describe() for machine in self._machines.values()]
        return [instance for instance in described if states is None or instance.state in states]

    def processes(self) -> list[int]:
        """List the live processes of all instances, their children included."""
        return find_processes(self.folder)

    def log(self, instance_id: str) -> str:
        """Read what an instance has printed."""
        path = self._machines[instance_id].log_path
        return path.read_text(errors="replace") if path.exists() else ""

    def interrupt(self, instance_id: str) -> None:
        """Interrupt an instance as EC2 interrupts spot instances."""
        self._machines[instance_id].power_off("spot")

    def wait_until_quiet(self, timeout: float) -> bool:
        """Wait until no process and no instance that costs money is left; return whether that happened in time."""
        deadline = time.monotonic() + timeout
        busy = (*ALIVE, "shutting-down", "stopping")
        with self.changed:
            if not self.changed.wait_for(lambda: not self.instances(busy), timeout):
                return False
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def note(self, caller: str, call: Call) -> None:
        """Record a request."""
        self._notes.append((caller, call))

    def find_refusal(self, action: str, form: dict[str, str]) -> Refusal | None:
        """Find the injected refusal of a call, if any."""
        with self.changed:
            concerned = [refusal for refusal in self.faults.refusals if refusal.concerns(action, form)]
            return next((refusal for refusal in concerned if refusal.strikes()), None)

    def power_on(self) -> None:
        """Start the instances whose launch has been answered; as on EC2, the answer says that they are pending."""
        with self.changed:
            asleep, self._asleep = self._asleep, []
        for machine in asleep:
            machine.power_on()

    def _power_everything_off(self) -> None:
        """End all instances, and check that none is left."""
        with self.changed:
            self.is_closing = True
            machines = list(self._machines.values())
        for machine in machines:
            machine.power_off("user")
        for machine in machines:
            machine.join(30)
        if left := self.processes():
            raise RuntimeError(f"processes of instances are alive after the end: {left}")

    @contextlib.contextmanager
    def _serve(self) -> Iterator[str]:
        """Serve on a free port of 127.0.0.1."""
        server = make_server("127.0.0.1", 0, _Gateway(self), threaded=True, request_handler=_QuietHandler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    @contextlib.contextmanager
    def _own_moto(self) -> Iterator[None]:
        """Take over EC2 and IAM of moto, and remove our buckets at the end; other S3 servers are not affected."""
        if hasattr(InstanceBackend.run_instances, "is_loopback"):
            raise RuntimeError("this process already runs a loopback EC2")
        _reset_moto()
        self._furnish()
        with contextlib.ExitStack() as stack:
            for owner, name, replacement in (
                (InstanceBackend, "run_instances", self._replace_run_instances()),
                (Instance, "prep_nics", self._replace_prep_nics()),
                (Instance, "terminate", self._replace_terminate()),
            ):
                self.originals[name] = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, replacement))
            try:
                yield
            finally:
                for bucket in self.buckets:
                    _remove_bucket(bucket)
                _reset_moto()

    def _furnish(self) -> None:
        """Set up a default network, a security group, and two images of Canonical."""
        backend = ec2_backends[DEFAULT_ACCOUNT_ID][self.region]
        backend.amis.clear()
        subnet = min(backend.get_default_subnets().values(), key=lambda subnet: str(subnet.availability_zone))
        self.vpc_id, self.subnet_id = subnet.vpc_id, subnet.id
        group = backend.create_security_group("loopback", "for instances of the loopback EC2", vpc_id=self.vpc_id)
        self.security_group_id = group.id
        images = {architecture: _add_image(backend, architecture) for architecture in ("amd64", "arm64")}
        self.ami, self.arm_ami = images["amd64"], images["arm64"]

    def _replace_run_instances(self) -> Callable[..., Any]:
        """Make a RunInstances that refuses what EC2 refuses, and starts the instances."""

        def run_instances(
            backend: Any, image_id: str, count: int, user_data: Any, security_group_names: list[str], **kwargs: Any
        ) -> Any:
            _check_launch(backend, image_id, user_data, kwargs)
            reservation = self.originals["run_instances"](
                backend, image_id, count, user_data, security_group_names, **kwargs
            )
            with self.changed:
                if self.is_closing:
                    raise EC2ClientError("Unavailable", "the loopback EC2 is closing")
                for instance in reservation.instances:
                    self._asleep.append(self._find_machine(instance))
            return reservation

        run_instances.is_loopback = True
        return run_instances

    def _replace_prep_nics(self) -> Callable[..., None]:
        """Make a method that gives an instance its address before it is visible, and leaves it pending."""

        def prep_nics(instance: Instance, *args: Any, **kwargs: Any) -> None:
            self.originals["prep_nics"](instance, *args, **kwargs)
            address = self._take_address()
            self.wants_public[instance.id] = any(nic.public_ip for nic in instance.nics.values())
            for nic in instance.nics.values():
                nic.public_ip, nic.public_ip_auto_assign = None, False
                nic.private_ip_address = address
                nic.private_ip_addresses = [{"Primary": True, "PrivateIpAddress": address}]
            instance._state = InstanceState("pending", _STATE_CODES["pending"])

        return prep_nics

    def _replace_terminate(self) -> Callable[..., InstanceState]:
        """Make a method that ends the processes of an instance once, after the answer."""

        def terminate(instance: Instance) -> InstanceState:
            previous = copy.copy(instance._state)
            self._find_machine(instance).power_off("user")
            return previous

        return terminate

    def _find_machine(self, instance: Instance) -> _Machine:
        """Return the machine of an instance, which other threads may see before its launch is answered."""
        with self.changed:
            if instance.id not in self._machines:
                self._machines[instance.id] = _Machine(self, instance)
            return self._machines[instance.id]

    def _take_address(self) -> str:
        """Take an address of this simulator's network; the first one marks the network as taken."""
        with self.changed:
            self._n_addresses += 1
            if self._n_addresses > 254:
                raise EC2ClientError("InsufficientFreeAddressesInSubnet", "the loopback EC2 has 253 addresses")
            return f"{self.network}.{self._n_addresses}"


def _name_key(caller: str) -> str:
    """Name the access key of a caller, which identifies its requests."""
    return "LOOPBACK" + re.sub("[^A-Z0-9]", "", caller.upper())


def _disarm_clusters() -> None:
    """Keep clusters that were left open from calling the real EC2 when the interpreter exits."""
    deploy = sys.modules.get("distributed.deploy.spec")
    for cluster in list(deploy.SpecCluster._instances) if deploy else ():
        if hasattr(cluster, "boto_session"):
            cluster.shutdown_on_close = False


@contextlib.contextmanager
def keep_dask_config() -> Iterator[None]:
    """Restore the configuration of Dask, in which EC2Cluster leaves TLS settings for every later cluster."""
    kept = copy.deepcopy(dask.config.config)
    try:
        yield
    finally:
        dask.config.config.clear()
        dask.config.config.update(kept)


def _reset_moto() -> None:
    """Reset EC2 and IAM of moto, and nothing else."""
    # Without moto's own list of 1,300 images, which takes a third of a second to build.
    with mock.patch.dict(os.environ, {"MOTO_EC2_LOAD_DEFAULT_AMIS": "false"}):
        for backends in (ec2_backends, iam_backends):
            for of_account in list(backends.values()):
                of_account.reset()


def _remove_bucket(name: str) -> None:
    """Remove a bucket of moto with its content."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    bucket = backend.buckets.pop(name, None)
    s3_backends.bucket_accounts.pop(name, None)
    if bucket is None:
        return
    for _, versions in bucket.keys.lists():
        for version in versions:
            if hasattr(version, "dispose"):
                version.dispose()
    for upload in bucket.multiparts.values():
        upload.dispose()


def _add_image(backend: Any, architecture: str) -> str:
    """Add an image with a name as Canonical gives."""
    image = Ami(
        backend,
        f"ami-0{uuid.uuid4().hex[:16]}",
        name=f"ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-{architecture}-server-20261101",
        owner_id=CANONICAL,
        public=True,
        virtualization_type="hvm",
        architecture={"amd64": "x86_64"}.get(architecture, architecture),
        creation_date=datetime(2026, 11, 1, tzinfo=UTC).replace(tzinfo=None),
        root_device_type="ebs",
        hypervisor="xen",
    )
    backend.amis[image.id] = image
    return image.id


def _check_launch(backend: Any, image_id: str, user_data: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what EC2 refuses but moto accepts."""
    if user_data is not None and len(base64.b64decode(str(user_data))) > MAX_USER_DATA_BYTES:
        raise EC2ClientError("InvalidParameterValue", f"User data is limited to {MAX_USER_DATA_BYTES} bytes")
    if image_id not in backend.amis:
        raise EC2ClientError("InvalidAMIID.NotFound", f"The image id '[{image_id}]' does not exist")
    kind = kwargs["instance_type"]
    if kind not in INSTANCE_TYPES:
        raise EC2ClientError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
    if backend.amis[image_id].architecture not in INSTANCE_TYPES[kind]["ProcessorInfo"]["SupportedArchitectures"]:
        message = f"The architecture of instance type '{kind}' does not match that of the specified AMI."
        raise EC2ClientError("InvalidParameterValue", message)
    for nic in kwargs.get("nics") or []:
        _check_interface(backend, nic, kind)


def _check_interface(backend: Any, nic: dict[str, Any], kind: str) -> None:
    """Refuse unknown security groups, and instance types that the zone of the subnet does not offer."""
    for group in nic.get("Groups") or []:
        if backend.get_security_group_from_id(group) is None:
            raise EC2ClientError("InvalidGroup.NotFound", f"The security group '{group}' does not exist")
    if "SubnetId" not in nic:
        return
    zone = backend.get_subnet(nic["SubnetId"]).availability_zone
    offered = INSTANCE_TYPE_OFFERINGS["availability-zone"][backend.region_name]
    if not any(offer["InstanceType"] == kind and offer["Location"] == zone for offer in offered):
        message = f"Instance type ({kind}) is not supported in your requested Availability Zone ({zone})."
        raise EC2ClientError("Unsupported", message)
