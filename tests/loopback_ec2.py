"""A simulated EC2 on this machine whose instances really run, to test a cluster launcher without a cloud.

A moto server answers for EC2, S3, IAM and STS on 127.0.0.1. Each instance gets its own loopback address. When it boots,
it runs the ``docker run`` line of its user data as a process of this machine, with this interpreter instead of the
image's. So an unmodified ``dask_cloudprovider.aws.EC2Cluster`` starts real schedulers and workers, which talk to each
other and to the client over TLS. The user data passes through YAML and a real shell, as on a real instance, so wrong
quoting fails here too.

It does not simulate images, docker, the bootstrap by apt, GPU drivers, security groups, IAM policies, the metadata
service, quotas or real latency. It accepts any credentials, unless ``needs_profile`` is set. Processes share the
memory, disk and interpreter of this machine. Its responses are consistent at once, whereas the real EC2 may not list a
new instance for a while.

Linux only, because all addresses of 127.0.0.0/8 must belong to this machine. Each scheduler listens on port 8786 of its
own address, so no other program may listen on port 8786 of 0.0.0.0. There can be only one simulator per process,
because moto's state is global.
"""

import contextlib
import copy
import os
import re
import shutil
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import boto3
import dask.config
import pytest
from ec2_gateway import Call, Faults, Refusal, serve
from ec2_machines import PENDING, LoopbackInstance, Machine
from ec2_moto import add_image, check_launch, remove_bucket, reset_moto
from machines import find_processes, reserve_network
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import Instance, InstanceBackend, InstanceState

from fruitdask.core.s3 import S3

ALIVE = ("pending", "running")

# fsspec caches file systems by their options. Here each endpoint has a cache of its own; otherwise a cached file system
# would call a server that has ended. The caches are never emptied: unclosed clients warn when they are collected.
_file_systems: dict[str, dict[str, Any]] = defaultdict(dict)


class LoopbackEC2:
    """A simulated EC2, with S3, IAM and STS, whose instances are processes of this machine.

    A minute of ``shutdown -h +N`` in the user data takes ``seconds_per_minute``. If ``needs_profile`` is set, only
    instances with an instance profile have credentials.
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
        self._machines: dict[str, Machine] = {}
        self._asleep: list[Machine] = []
        self._n_addresses = 1
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start the server."""
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="loopback-ec2-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.network = stack.enter_context(reserve_network())
            stack.enter_context(self._own_moto())
            self.endpoint_url = stack.enter_context(serve(self))
            stack.callback(self._power_everything_off)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all instances, stop the server, and delete all files."""
        if error is not None:
            for machine in self._machines.values():
                log = self.log(machine.instance.id)
                error.add_note(f"{machine.plan.role} {machine.instance.id}:\n{log[-3000:]}")
        self._stack.close()
        _disarm_clusters()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make AWS clients use only this server."""
        return self.build_environment("client", has_credentials=True)

    @property
    def calls(self) -> list[Call]:
        """The requests so far."""
        return [call for _, call in list(self._notes)]

    def calls_by(self, name: str) -> list[Call]:
        """Return the requests that an instance, given by its id, or "client" has sent so far."""
        return [call for caller, call in list(self._notes) if caller == _name_key(name)]

    def build_environment(self, caller: str, *, has_credentials: bool) -> dict[str, str]:
        """Build the environment variables of an AWS client with a name."""
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
        # A service's own variable, which the developer may have set, takes precedence over the general one.
        for suffix in ("", "_EC2", "_S3", "_IAM", "_STS"):
            environment["AWS_ENDPOINT_URL" + suffix] = self.endpoint_url
        if has_credentials:
            environment |= {"AWS_ACCESS_KEY_ID": _name_key(caller), "AWS_SECRET_ACCESS_KEY": "loopback"}
        return environment

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Make all AWS clients of this process and its children use this server, and make clusters poll it often."""
        patch.setattr("fruitdask.cluster.cloud.cluster.CloudCluster.poll_seconds", 0.1)
        patch.setattr("fruitdask.cluster.ec2.instances._POLL_SECONDS", 0.1)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in self.environment.items():
            patch.setenv(name, value)
        patch.setattr(S3, "_cache", _file_systems[self.endpoint_url])

    @contextlib.contextmanager
    def client(self, service: str, **options: Any) -> Iterator[Any]:
        """Open a boto3 client of this server, regardless of the environment."""
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
        """List the instances in some states (None: in any state), in the order of launch."""
        with self.changed:
            described = [machine.describe() for machine in self._machines.values()]
        return [instance for instance in described if states is None or instance.state in states]

    def processes(self) -> list[int]:
        """List the live processes of all instances, including their children."""
        return find_processes(self.folder)

    def log(self, instance_id: str) -> str:
        """Read the output of an instance."""
        path = self._machines[instance_id].log_path
        return path.read_text(errors="replace") if path.exists() else ""

    def interrupt(self, instance_id: str) -> None:
        """Interrupt an instance, as EC2 interrupts spot instances."""
        self._machines[instance_id].power_off("spot")

    def wait_until_quiet(self, timeout: float) -> bool:
        """Wait until no process and no instance that costs money is left; return whether that happened in time."""
        busy = (*ALIVE, "shutting-down", "stopping")
        with self.changed:
            return self.changed.wait_for(lambda: not self.instances(busy) and not self.processes(), timeout)

    def note(self, caller: str, call: Call) -> None:
        """Record a request."""
        self._notes.append((caller, call))

    def find_refusal(self, action: str, form: dict[str, str]) -> Refusal | None:
        """Find the injected refusal of a call, if any."""
        with self.changed:
            concerned = [refusal for refusal in self.faults.refusals if refusal.concerns(action, form)]
            return next((refusal for refusal in concerned if refusal.strikes()), None)

    def power_on(self) -> None:
        """Start the launched instances, after the response has reported them as pending, as on EC2."""
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
    def _own_moto(self) -> Iterator[None]:
        """Take over moto's EC2 and IAM, and remove our buckets at the end; other S3 servers are not affected."""
        if hasattr(InstanceBackend.run_instances, "is_loopback"):
            raise RuntimeError("this process already runs a loopback EC2")
        reset_moto()
        self._set_up_account()
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
                    remove_bucket(bucket)
                reset_moto()

    def _set_up_account(self) -> None:
        """Set up a default network, a security group, and two of Canonical's machine images."""
        backend = ec2_backends[DEFAULT_ACCOUNT_ID][self.region]
        backend.amis.clear()
        subnet = min(backend.get_default_subnets().values(), key=lambda subnet: str(subnet.availability_zone))
        self.vpc_id, self.subnet_id = subnet.vpc_id, subnet.id
        group = backend.create_security_group("loopback", "for instances of the loopback EC2", vpc_id=self.vpc_id)
        self.security_group_id = group.id
        images = {architecture: add_image(backend, architecture) for architecture in ("amd64", "arm64")}
        self.ami, self.arm_ami = images["amd64"], images["arm64"]

    def _replace_run_instances(self) -> Callable[..., Any]:
        """Make a method that refuses what EC2 refuses, and prepares the instances to be started."""

        def run_instances(
            backend: Any, image_id: str, count: int, user_data: Any, security_group_names: list[str], **kwargs: Any
        ) -> Any:
            check_launch(backend, image_id, user_data, kwargs)
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
        """Make a method that gives an instance its address before clients see it, and leaves it pending."""

        def prep_nics(instance: Instance, *args: Any, **kwargs: Any) -> None:
            self.originals["prep_nics"](instance, *args, **kwargs)
            address = self._take_address()
            self.wants_public[instance.id] = any(nic.public_ip for nic in instance.nics.values())
            for nic in instance.nics.values():
                nic.public_ip, nic.public_ip_auto_assign = None, False
                nic.private_ip_address = address
                nic.private_ip_addresses = [{"Primary": True, "PrivateIpAddress": address}]
            instance._state = copy.copy(PENDING)

        return prep_nics

    def _replace_terminate(self) -> Callable[..., InstanceState]:
        """Make a method that ends the processes of an instance, and does nothing the second time."""

        def terminate(instance: Instance) -> InstanceState:
            previous = copy.copy(instance._state)
            self._find_machine(instance).power_off("user")
            return previous

        return terminate

    def _find_machine(self, instance: Instance) -> Machine:
        """Return the machine of an instance; other threads may ask for it before the launch has returned."""
        with self.changed:
            if instance.id not in self._machines:
                self._machines[instance.id] = Machine(self, instance)
            return self._machines[instance.id]

    def _take_address(self) -> str:
        """Take a free address of this simulator's network, whose first address reserves the network."""
        with self.changed:
            self._n_addresses += 1
            if self._n_addresses > 254:
                raise EC2ClientError("InsufficientFreeAddressesInSubnet", "the loopback EC2 has 253 addresses")
            return f"{self.network}.{self._n_addresses}"


def _name_key(caller: str) -> str:
    """Name the access key of a caller, by which its requests are recognized."""
    return "LOOPBACK" + re.sub("[^A-Z0-9]", "", caller.upper())


def _disarm_clusters() -> None:
    """Prevent clusters that were left open from calling the real EC2 when the interpreter exits."""
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
