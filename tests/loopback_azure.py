"""A simulated Azure on this machine whose virtual machines really run, to test a cluster launcher without a cloud.

It is a proxy on 127.0.0.1. The variables HTTPS_PROXY and HTTP_PROXY make the unmodified clients of Azure use it. It
answers over TLS for Resource Manager (management.azure.com) and Entra (login.microsoftonline.com), and for the metadata
service of machines (169.254.169.254). Each machine gets its own loopback address. When it boots, it runs the ``docker
run`` line of its custom data as a process of this machine. When that process or the lifetime of the machine ends, it
runs the script in its custom data by which it deletes itself, with the token of its identity.

It does not simulate images, docker, the bootstrap by apt, GPU drivers, security groups, role assignments, quotas and
real latency. It accepts any credentials; an identity may delete machines, unless ``may_delete`` is false.

Linux only, because all addresses of 127.0.0.0/8 must belong to this machine.
"""

import base64
import contextlib
import io
import json
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import pytest
from machines import Container, build_environment, find_processes, localize, read_plan, reserve_network
from servers import make_certificate

MAX_CUSTOM_DATA_BYTES = 65_535
LOCATIONS = ("westeurope", "francecentral", "eastus")
# Members that Resource Manager knows at the top of a resource's body; it refuses others.
_ENVELOPE = set("location tags properties sku plan identity zones extendedLocation".split())
#: How long a container may take to end after SIGTERM.
_GRACE_SECONDS = 0.05
_COMPUTE, _NETWORK = "Microsoft.Compute", "Microsoft.Network"


class Call(NamedTuple):
    """A request to Resource Manager."""

    caller: str
    method: str
    kind: str
    name: str


@dataclass
class Refusal:
    """Refuse requests about a kind of resources whose name matches a pattern, ``count`` times (None: always)."""

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
    """Injected faults; may be changed at any time."""

    never_boots: set[str] = field(default_factory=set)  # roles: "scheduler", "worker"
    unpullable: set[str] = field(default_factory=set)  # docker images
    refusals: list[Refusal] = field(default_factory=list)
    may_delete: bool = True


class _Error(Exception):
    """A refusal by Resource Manager."""

    def __init__(self, status: int, code: str, message: str = "refused by the loopback Azure") -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"code": code, "message": message}}


class Machine:
    """A virtual machine: starting, running, stopped (which still costs money) or deleted."""

    def __init__(self, cloud: "LoopbackAzure", path: str, body: dict[str, Any], address: str) -> None:
        self.cloud, self.path, self.name, self.address = cloud, path, path.rsplit("/", 1)[1], address
        self.body, self.power, self.was_evicted = body, "starting", False
        self.custom_data = base64.b64decode(body["properties"]["osProfile"].get("customData", "")).decode()
        self.plan = read_plan(self.custom_data)
        self.folder = cloud.folder / self.name
        self.log_path = self.folder / "log.txt"
        self.has_identity = bool(body.get("identity", {}).get("userAssignedIdentities"))
        self._over = threading.Event()
        self._container: Container | None = None
        for name in ("cwd", "home", "tmp"):
            (self.folder / name).mkdir(parents=True)
        self._thread = threading.Thread(target=self._live, name=self.name, daemon=True)
        self._thread.start()

    @property
    def is_spot(self) -> bool:
        """Whether Azure may evict it."""
        return self.body["properties"].get("priority") == "Spot"

    def delete(self, *, was_evicted: bool = False) -> None:
        """End it."""
        self.was_evicted = was_evicted
        self._set_power("deleted")
        self._over.set()

    def join(self) -> None:
        """Wait until all of its processes have ended."""
        self._thread.join(30)

    def log(self) -> str:
        """Read what it has printed."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _set_power(self, power: str) -> None:
        with self.cloud.changed:
            if self.power != "deleted":
                self.power = power
            self.cloud.changed.notify_all()

    def _live(self) -> None:
        """Boot, wait for any end, and clean up."""
        self._set_power("running")
        if self.plan.role in self.cloud.faults.never_boots:
            self._over.wait()
        else:
            self._boot()
        if self._container is not None:
            if not (self.was_evicted or self.cloud.is_closing):
                self._container.stop(_GRACE_SECONDS)
            self._container.kill()
            self._container.close()
        with self.cloud.changed:
            self.cloud.changed.notify_all()

    def _boot(self) -> None:
        """Follow the custom data until the machine is deleted."""
        if self.plan.problem or self.plan.image in self.cloud.faults.unpullable:
            self.log_path.write_text(f"docker: cannot pull the image {self.plan.image!r} {self.plan.problem}\n")
        elif self.plan.command:
            self._container = Container(
                localize(self.plan.command, self.address),
                folder=self.folder / "cwd",
                log=self.log_path,
                environment=build_environment(self.folder) | self.plan.variables,
            )
            while not self._over.is_set() and not self._container.wait(0.02):
                if self.cloud.lifetime_is_over.is_set() and self.plan.lifetime_minutes is not None:
                    break
        if not self._over.is_set() and self.plan.shuts_down:
            self._end_itself()

    def _end_itself(self) -> None:
        """Run the script of the custom data; if it fails, the shell stops the machine without releasing it."""
        [script] = self.plan.files.values()
        (self.folder / "end.py").write_text(script.replace("(1, 5, 10, 30, 60)", "(0,)"))
        environment = build_environment(self.folder) | self.cloud.build_proxy(self.name)
        command = [sys.executable, str(self.folder / "end.py")]
        done = subprocess.run(command, env=environment, cwd=self.folder / "cwd", capture_output=True, text=True)
        with self.log_path.open("a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            self._set_power("stopped")
        self._over.wait()


class _Handler(BaseHTTPRequestHandler):
    """Answers requests through a tunnel, or to a proxy."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Server"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_CONNECT(self) -> None:
        """Speak TLS in the name of the requested host."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = io.BufferedWriter(self.connection.makefile("wb", buffering=0))  # type: ignore[assignment,arg-type]
        self.close_connection = False

    def finish(self) -> None:
        """Close the whole connection; the other end may be gone."""
        for part in (self.wfile, self.rfile, self.connection):
            with contextlib.suppress(OSError, ValueError):
                part.close()

    def answer(self) -> None:
        """Answer a request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        host = urlsplit(self.path).hostname or self.headers.get("Host", "")
        try:
            status, content, headers = self.server.cloud.answer(host, self.command, self.path, self.headers, body)
        except _Error as error:
            status, content, headers = error.status, error.body, {}
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    do_GET = do_PUT = do_DELETE = do_POST = answer


class _Server(ThreadingHTTPServer):
    """The proxy."""

    daemon_threads = True

    def __init__(self, cloud: "LoopbackAzure", certificate: str, key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cloud = cloud
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that are gone."""


class LoopbackAzure:
    """A subscription with a resource group that has a virtual network and a security group."""

    def __init__(self, *, location: str = "westeurope") -> None:
        self.location = location
        self.faults = Faults()
        self.calls: list[Call] = []
        self.machines: dict[str, Machine] = {}
        self.is_closing = False
        #: Set to end the lifetime of all machines that have a timer.
        self.lifetime_is_over = threading.Event()
        self.changed = threading.Condition(threading.RLock())
        self.subscription, self.group = str(uuid.uuid4()), "fruits"
        self.base = f"/subscriptions/{self.subscription}/resourceGroups/{self.group}/providers"
        self._resources: dict[str, dict[str, Any]] = {}
        self._n_addresses = 1
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start the server."""
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="loopback-azure-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.network = stack.enter_context(reserve_network())
            names = ("management.azure.com", "login.microsoftonline.com")
            self.certificate, key = make_certificate(self.folder, *names)
            server = stack.enter_context(_Server(self, self.certificate, key))
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            self._furnish()
            stack.callback(self._end_everything)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End all machines, and forget everything."""
        if error is not None:
            for machine in self.machines.values():
                error.add_note(f"{machine.name}:\n{machine.log()[-3000:]}")
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make clients of Azure talk to this server only."""
        ids = {"AZURE_TENANT_ID": str(uuid.UUID(int=1)), "AZURE_CLIENT_ID": "client"}
        ids |= {"AZURE_CLIENT_SECRET": "loopback", "AZURE_SUBSCRIPTION_ID": self.subscription}
        return ids | {"REQUESTS_CA_BUNDLE": self.certificate} | self.build_proxy("client")

    def build_proxy(self, caller: str) -> dict[str, str]:
        """Build the variables that make a caller use this proxy."""
        proxy = f"http://{caller}:x@127.0.0.1:{self.port}"
        names = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY")
        local = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        return dict.fromkeys(names, proxy) | local | {"SSL_CERT_FILE": self.certificate}

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Make all Azure clients of this process and its children talk to this server, and poll it often."""
        patch.setattr("fruitdask.cluster.azure.cluster.RunCluster.poll_seconds", 0.2)
        patch.setattr("fruitdask.cluster.cloud.cluster._SLOW_POLL_SECONDS", 2.0)
        for name in ("cluster", "machines"):
            patch.setattr(f"fruitdask.cluster.azure.{name}._POLL_SECONDS", 0.05)
        for name, value in self.environment.items():
            patch.setenv(name, value)

    def list_resources(self) -> list[str]:
        """List the resources of the group without its network, by kind and name."""
        with self.changed:
            found = [path.removeprefix(self.base.lower()).split("/", 2)[2] for path in self._resources]
        return sorted(name for name in found if not name.startswith(("virtualnetworks", "networksecuritygroups")))

    def find(self, name: str) -> dict[str, Any]:
        """Find a resource by the end of its id."""
        with self.changed:
            return next(found for path, found in self._resources.items() if path.endswith(name.lower()))

    def alive(self, role: str = "") -> list[Machine]:
        """List the machines that exist, in the order of their creation."""
        with self.changed:
            return [one for one in self.machines.values() if one.power != "deleted" and role in ("", one.plan.role)]

    def processes(self) -> list[int]:
        """List the live processes of all machines, their children included."""
        return find_processes(self.folder)

    def wait_until_quiet(self, timeout: float) -> bool:
        """Wait until no process and no resource that costs money is left; return whether that happened in time."""
        deadline = time.monotonic() + timeout
        while self.list_resources() or self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def evict(self, machine: Machine) -> None:
        """Evict a machine, as Azure evicts spot machines with the eviction policy Delete."""
        self._delete_machine(machine.path, was_evicted=True)

    def put(self, kind: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Store a resource."""
        path = f"{self.base}/{kind}/{name}"
        resource = {"location": self.location, **body, "id": path, "name": name, "type": kind}
        resource.setdefault("properties", {})["provisioningState"] = "Succeeded"
        with self.changed:
            self._resources[path.lower()] = resource
        return resource

    def answer(self, host: str, method: str, url: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, Any]]:
        """Answer a request to any of the hosts."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        if host.startswith("169.254.169.254"):
            return 200, self._answer_metadata(path, headers), {}
        if host.startswith("login."):
            return 200, self._answer_login(path), {}
        if path.startswith("/console/"):
            return 200, self.machines[path.rsplit("/", 1)[1]].log().encode(), {}
        if "api-version" not in query:
            raise _Error(400, "MissingApiVersionParameter")
        return self._answer_manager(method, path, headers, body)

    def _answer_login(self, path: str) -> dict[str, Any]:
        """Answer for Entra, which accepts any secret here."""
        root = "https://login.microsoftonline.com/" + path.split("/")[1]
        if path.endswith("/token"):
            return {"access_token": "client", "expires_in": 3600, "token_type": "Bearer"}
        endpoints = {f"{name}_endpoint": f"{root}/oauth2/v2.0/{name}" for name in ("authorization", "token")}
        return {**endpoints, "issuer": f"{root}/v2.0"}

    def _answer_metadata(self, path: str, headers: Any) -> dict[str, Any]:
        """Answer for the metadata service, which recognizes the calling machine; here by the user of its proxy."""
        user = base64.b64decode(headers["Proxy-Authorization"].split()[1]).decode().partition(":")[0]
        machine = self.machines[user]
        if headers.get("Metadata") != "true":
            raise _Error(400, "BadRequest", "Required metadata header not specified")
        if path.endswith("/compute"):
            return {"name": machine.name, "resourceId": machine.path, "location": self.location}
        if not machine.has_identity:
            raise _Error(400, "invalid_request", "Identity not found")
        return {"access_token": machine.name, "expires_in": "3600", "token_type": "Bearer"}

    def _answer_manager(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, Any]]:
        """Answer for Resource Manager."""
        parts = path.strip("/").split("/")
        caller = headers.get("Authorization", "").removeprefix("Bearer ")
        if parts[1] != self.subscription:
            raise _Error(404, "SubscriptionNotFound", f"The subscription '{parts[1]}' could not be found.")
        if parts[2] == "operations":
            return 200, {"id": parts[3], "status": "Succeeded"}, {}
        if parts[3].lower() != self.group:
            raise _Error(404, "ResourceGroupNotFound", f"Resource group '{parts[3]}' could not be found.")
        kind, name, action = parts[6], "/".join(parts[7:8]), "/".join(parts[8:])
        with self.changed:
            self.note(Call(caller, method, kind + (f"/{action}" if action else ""), name))
            if caller in self.machines and not (
                self.faults.may_delete and (method, kind) == ("DELETE", "virtualMachines")
            ):
                raise _Error(403, "AuthorizationFailed", f"The client '{caller}' has no authorization.")
            if refusal := next((one for one in self.faults.refusals if one.strikes(method, kind, name)), None):
                raise _Error(refusal.status, refusal.code)
            if action:
                return 200, self._act(kind, name, action), {}
            if method == "GET":
                return 200, self._get(path), {}
            if method == "PUT":
                return 201, self._put(path, f"{parts[5]}/{kind}", name, json.loads(body)), self._operate()
            return (202, None, self._operate()) if self._delete(path, kind) else (204, None, {})

    def note(self, call: Call) -> None:
        """Record a request."""
        self.calls.append(call)

    def _furnish(self) -> None:
        """Create the network and its security group."""
        subnet = {"name": "default", "id": f"{self.base}/{_NETWORK}/virtualNetworks/vnet/subnets/default"}
        self.put(f"{_NETWORK}/virtualNetworks", "vnet", {"properties": {"subnets": [subnet]}})
        self.put(f"{_NETWORK}/networkSecurityGroups", "nsg", {})

    def _act(self, kind: str, name: str, action: str) -> dict[str, Any]:
        """Answer a POST or view request about a machine."""
        machine = self.machines.get(name)
        if machine is None or machine.power == "deleted":
            raise _Error(404, "ResourceNotFound", f"The Resource '{kind}/{name}' was not found.")
        if action == "instanceView":
            return {"statuses": [{"code": "ProvisioningState/succeeded"}, {"code": f"PowerState/{machine.power}"}]}
        if action == "retrieveBootDiagnosticsData":
            return {"serialConsoleLogBlobUri": f"http://127.0.0.1:{self.port}/console/{name}"}
        raise _Error(400, "BadRequest", f"the loopback Azure does not know {action}")

    def _get(self, path: str) -> dict[str, Any]:
        """Find a resource, or list those of a kind."""
        path = path.lower()
        if path in self._resources:
            return self._resources[path]
        if len(path.split("/")) % 2:
            raise _Error(404, "ResourceNotFound", f"The Resource '{path.rsplit('/', 1)[1]}' was not found.")
        return {"value": [found for key, found in self._resources.items() if key.rpartition("/")[0] == path]}

    def _put(self, path: str, kind: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create a resource, or refuse it."""
        if unknown := sorted(set(body) - _ENVELOPE):
            raise _Error(400, "InvalidRequestContent", f"Could not find member '{unknown[0]}'")
        if body["location"] not in LOCATIONS:
            raise _Error(400, "LocationNotAvailableForResourceType", f"'{body['location']}' is not available")
        properties = body.setdefault("properties", {})
        if kind.endswith("/publicIPAddresses"):
            properties["ipAddress"] = self._take_address()
        elif kind.endswith("/networkInterfaces"):
            [configuration] = properties["ipConfigurations"]
            self._check(configuration["properties"]["subnet"]["id"].partition("/subnets/")[0])
            self._check(properties["networkSecurityGroup"]["id"])
            public = configuration["properties"].get("publicIPAddress")
            address = self._check(public["id"])["properties"]["ipAddress"] if public else self._take_address()
            configuration["properties"]["privateIPAddress"] = address
        elif kind.endswith("/virtualMachines"):
            self._launch(path, name, body)
        return self.put(kind, name, body)

    def _launch(self, path: str, name: str, body: dict[str, Any]) -> None:
        """Start a machine with its disk, which does not get its tags."""
        properties = body["properties"]
        [nic] = properties["networkProfile"]["networkInterfaces"]
        [configuration] = self._check(nic["id"])["properties"]["ipConfigurations"]
        system = properties["osProfile"]
        if len(base64.b64decode(system.get("customData", ""))) > MAX_CUSTOM_DATA_BYTES:
            raise _Error(400, "InvalidParameter", "Custom data is too large")
        disk = properties["storageProfile"]["osDisk"]
        self.put(f"{_COMPUTE}/disks", disk.setdefault("name", f"{name}_OsDisk_1"), {"managedBy": path})
        properties["timeCreated"] = datetime.now(UTC).isoformat()
        self.machines[name] = Machine(
            self, path, json.loads(json.dumps(body)), configuration["properties"]["privateIPAddress"]
        )
        for secret in ("customData", "adminPassword"):
            system.pop(secret, None)

    def _check(self, path: str) -> dict[str, Any]:
        """Find a resource that another one refers to."""
        if path.lower() not in self._resources:
            raise _Error(400, "InvalidResourceReference", f"Resource {path} referenced was not found.")
        return self._resources[path.lower()]

    def _delete(self, path: str, kind: str) -> bool:
        """Delete an unused resource; return whether it existed."""
        if path.lower() not in self._resources:
            return False
        users = [key for key, found in self._resources.items() if key != path.lower() and _refers(found, path)]
        if kind in ("networkInterfaces", "publicIPAddresses", "disks") and users:
            raise _Error(400, "InUse", f"{path} is used by {users[0]}")
        if kind == "virtualMachines":
            self._delete_machine(path)
        else:
            del self._resources[path.lower()]
        return True

    def _delete_machine(self, path: str, *, was_evicted: bool = False) -> None:
        """Delete a machine, and the resources that are deleted with it."""
        with self.changed:
            machine = self._resources.pop(path.lower())
            properties = machine["properties"]
            disk, [nic] = properties["storageProfile"]["osDisk"], properties["networkProfile"]["networkInterfaces"]
            if disk.get("deleteOption") == "Delete":
                self._resources.pop(f"{self.base}/{_COMPUTE}/disks/{disk['name']}".lower(), None)
            if nic.get("properties", {}).get("deleteOption") == "Delete":
                [configuration] = self._resources.pop(nic["id"].lower())["properties"]["ipConfigurations"]
                public = configuration["properties"].get("publicIPAddress", {})
                if public.get("properties", {}).get("deleteOption") == "Delete":
                    self._resources.pop(public["id"].lower())
            self.machines[machine["name"]].delete(was_evicted=was_evicted)

    def _operate(self) -> dict[str, Any]:
        """Build the headers that say where to poll an operation."""
        url = f"https://management.azure.com/subscriptions/{self.subscription}/operations/{uuid.uuid4()}?api-version=1"
        return {"Azure-AsyncOperation": url, "Location": url, "retry-after-ms": 20}

    def _take_address(self) -> str:
        """Take an address of this simulator's network; the first one marks the network as taken."""
        self._n_addresses += 1
        return f"{self.network}.{self._n_addresses}"

    def _end_everything(self) -> None:
        """End all machines, and check that none is left."""
        self.is_closing = True
        for machine in self.machines.values():
            machine.delete()
        for machine in self.machines.values():
            machine.join()
        if left := self.processes():
            raise RuntimeError(f"processes of machines are alive after the end: {left}")


def _refers(resource: dict[str, Any], path: str) -> bool:
    """Whether a resource refers to another one, or is managed by it."""
    return path.lower() in json.dumps(resource["properties"]).lower() or resource.get("managedBy") == path
