"""A simulated Azure on this machine whose virtual machines really run, to test a cluster launcher without a cloud.

The simulator is a proxy on 127.0.0.1. The variables HTTPS_PROXY and HTTP_PROXY make Azure's own clients use it. It acts
as Resource Manager (management.azure.com) and Entra (login.microsoftonline.com), both over TLS, and as the metadata
service of machines (169.254.169.254). Each machine gets its own loopback address. When it boots, it runs the ``docker
run`` line of its custom data as a process of this machine. When that process or the lifetime of the machine ends, it
deletes itself by a script in its custom data, with the token of its identity.

It does not simulate images, docker, the bootstrap by apt, GPU drivers, security groups, role assignments, quotas or
real latency. It accepts any credentials. An identity may delete machines, unless ``may_delete`` is false.

Linux only, because all addresses of 127.0.0.0/8 must belong to this machine.
"""

import base64
import contextlib
import json
import shutil
import tempfile
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest
from azure_machines import Machine
from azure_proxy import Call, Faults, ServerError, serve
from machines import find_processes, reserve_network
from servers import make_certificate

MAX_CUSTOM_DATA_BYTES = 65_535
LOCATIONS = ("westeurope", "francecentral", "eastus")
# Members that Resource Manager knows at the top of a resource's body; it refuses others.
_ENVELOPE = set("location tags properties sku plan identity zones extendedLocation".split())
_COMPUTE, _NETWORK = "Microsoft.Compute", "Microsoft.Network"


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
            self.port = stack.enter_context(serve(self, self.certificate, key))
            self._create_network()
            stack.callback(self._end_everything)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End all machines, stop the server, and delete all files."""
        if error is not None:
            for machine in self.machines.values():
                error.add_note(f"{machine.name}:\n{machine.log()[-3000:]}")
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make Azure's clients use only this server."""
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
        """Make all Azure clients of this process and its children use this server, and make clusters poll it often."""
        patch.setattr("fruitdask.cluster.azure.cluster.RunCluster.poll_seconds", 0.2)
        patch.setattr("fruitdask.cluster.cloud.cluster._SLOW_POLL_SECONDS", 2.0)
        for name in ("cluster", "machines"):
            patch.setattr(f"fruitdask.cluster.azure.{name}._POLL_SECONDS", 0.05)
        for name, value in self.environment.items():
            patch.setenv(name, value)

    def list_resources(self) -> list[str]:
        """List the resources of the group except its network, by kind and name."""
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
        """List the live processes of all machines, including their children."""
        return find_processes(self.folder)

    def wait_until_quiet(self, timeout: float) -> bool:
        """Wait until no process and no resource that costs money is left; return whether that happened in time."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.list_resources() and not self.processes(), timeout)

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

    def respond(self, host: str, method: str, url: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, Any]]:
        """Respond to a request to any of the hosts."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        if host.startswith("169.254.169.254"):
            return 200, self._respond_as_metadata(path, headers), {}
        if host.startswith("login."):
            return 200, self._respond_as_login(path), {}
        if path.startswith("/console/"):
            return 200, self.machines[path.rsplit("/", 1)[1]].log().encode(), {}
        if "api-version" not in query:
            raise ServerError(400, "MissingApiVersionParameter")
        return self._respond_as_manager(method, path, headers, body)

    def _respond_as_login(self, path: str) -> dict[str, Any]:
        """Respond as Entra, which accepts any secret here."""
        root = "https://login.microsoftonline.com/" + path.split("/")[1]
        if path.endswith("/token"):
            return {"access_token": "client", "expires_in": 3600, "token_type": "Bearer"}
        endpoints = {f"{name}_endpoint": f"{root}/oauth2/v2.0/{name}" for name in ("authorization", "token")}
        return {**endpoints, "issuer": f"{root}/v2.0"}

    def _respond_as_metadata(self, path: str, headers: Any) -> dict[str, Any]:
        """Respond as the metadata service, which here recognizes a machine by the user name that it gives the proxy."""
        user = base64.b64decode(headers["Proxy-Authorization"].split()[1]).decode().partition(":")[0]
        machine = self.machines[user]
        if headers.get("Metadata") != "true":
            raise ServerError(400, "BadRequest", "Required metadata header not specified")
        if path.endswith("/compute"):
            return {"name": machine.name, "resourceId": machine.path, "location": self.location}
        if not machine.has_identity:
            raise ServerError(400, "invalid_request", "Identity not found")
        return {"access_token": machine.name, "expires_in": "3600", "token_type": "Bearer"}

    def _respond_as_manager(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, Any]]:
        """Respond as Resource Manager."""
        parts = path.strip("/").split("/")
        caller = headers.get("Authorization", "").removeprefix("Bearer ")
        if parts[1] != self.subscription:
            raise ServerError(404, "SubscriptionNotFound", f"The subscription '{parts[1]}' could not be found.")
        if parts[2] == "operations":
            return 200, {"id": parts[3], "status": "Succeeded"}, {}
        if parts[3].lower() != self.group:
            raise ServerError(404, "ResourceGroupNotFound", f"Resource group '{parts[3]}' could not be found.")
        kind, name, action = parts[6], "/".join(parts[7:8]), "/".join(parts[8:])
        with self.changed:
            self.note(Call(caller, method, kind + (f"/{action}" if action else ""), name))
            if caller in self.machines and not (
                self.faults.may_delete and (method, kind) == ("DELETE", "virtualMachines")
            ):
                raise ServerError(403, "AuthorizationFailed", f"The client '{caller}' has no authorization.")
            if refusal := next((one for one in self.faults.refusals if one.strikes(method, kind, name)), None):
                raise ServerError(refusal.status, refusal.code)
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

    def _create_network(self) -> None:
        """Create the network and the security group."""
        subnet = {"name": "default", "id": f"{self.base}/{_NETWORK}/virtualNetworks/vnet/subnets/default"}
        self.put(f"{_NETWORK}/virtualNetworks", "vnet", {"properties": {"subnets": [subnet]}})
        self.put(f"{_NETWORK}/networkSecurityGroups", "nsg", {})

    def _act(self, kind: str, name: str, action: str) -> dict[str, Any]:
        """Respond to a request for an action on a machine, or for a view of it."""
        machine = self.machines.get(name)
        if machine is None or machine.power == "deleted":
            raise ServerError(404, "ResourceNotFound", f"The Resource '{kind}/{name}' was not found.")
        if action == "instanceView":
            return {"statuses": [{"code": "ProvisioningState/succeeded"}, {"code": f"PowerState/{machine.power}"}]}
        if action == "retrieveBootDiagnosticsData":
            return {"serialConsoleLogBlobUri": f"http://127.0.0.1:{self.port}/console/{name}"}
        raise ServerError(400, "BadRequest", f"the loopback Azure does not support {action}")

    def _get(self, path: str) -> dict[str, Any]:
        """Find a resource, or list all resources of a kind."""
        path = path.lower()
        if path in self._resources:
            return self._resources[path]
        if len(path.split("/")) % 2:
            raise ServerError(404, "ResourceNotFound", f"The Resource '{path.rsplit('/', 1)[1]}' was not found.")
        return {"value": [found for key, found in self._resources.items() if key.rpartition("/")[0] == path]}

    def _put(self, path: str, kind: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create a resource, or refuse it."""
        if unknown := sorted(set(body) - _ENVELOPE):
            raise ServerError(400, "InvalidRequestContent", f"Could not find member '{unknown[0]}'")
        if body["location"] not in LOCATIONS:
            raise ServerError(400, "LocationNotAvailableForResourceType", f"'{body['location']}' is not available")
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
        """Start a machine, and create its disk, which does not get the machine's tags."""
        properties = body["properties"]
        [nic] = properties["networkProfile"]["networkInterfaces"]
        [configuration] = self._check(nic["id"])["properties"]["ipConfigurations"]
        system = properties["osProfile"]
        if len(base64.b64decode(system.get("customData", ""))) > MAX_CUSTOM_DATA_BYTES:
            raise ServerError(400, "InvalidParameter", "Custom data is too large")
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
            raise ServerError(400, "InvalidResourceReference", f"Resource {path} referenced was not found.")
        return self._resources[path.lower()]

    def _delete(self, path: str, kind: str) -> bool:
        """Delete an unused resource; return whether it existed."""
        if path.lower() not in self._resources:
            return False
        users = [key for key, found in self._resources.items() if key != path.lower() and _refers(found, path)]
        if kind in ("networkInterfaces", "publicIPAddresses", "disks") and users:
            raise ServerError(400, "InUse", f"{path} is used by {users[0]}")
        if kind == "virtualMachines":
            self._delete_machine(path)
        else:
            del self._resources[path.lower()]
            self.changed.notify_all()
        return True

    def _delete_machine(self, path: str, *, was_evicted: bool = False) -> None:
        """Delete a machine, and the resources that are to be deleted with it."""
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
        """Build the headers that say where to poll the state of an operation."""
        url = f"https://management.azure.com/subscriptions/{self.subscription}/operations/{uuid.uuid4()}?api-version=1"
        return {"Azure-AsyncOperation": url, "Location": url, "retry-after-ms": 20}

    def _take_address(self) -> str:
        """Take a free address of this simulator's network, whose first address reserves the network."""
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
