"""The kinds of clusters."""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, field_validator, model_validator

from fruitdask.core.config.base import Seconds, Section


class LocalClusterConfig(Section):
    """A Dask cluster on this machine."""

    kind: Literal["local"] = "local"
    n_workers: int | None = Field(None, ge=1, description="Worker processes; null chooses by cores and memory.")
    threads_per_worker: int | None = Field(None, ge=1, description="Threads per process; null chooses by cores.")
    memory_limit: str | int | None = Field(None, description="Memory per process, such as 4GiB; null: an equal share.")
    dashboard_address: str | None = Field(
        "127.0.0.1:8787", description="Address of the dashboard, on this machine only; null turns it off."
    )

    @field_validator("memory_limit")
    @classmethod
    def _check_memory(cls, limit: str | int | None) -> str | int | None:
        if isinstance(limit, int) and limit < 0:
            raise ValueError(f"expected an amount of memory such as 4GiB, found {limit!r}")
        return limit

    @field_validator("dashboard_address")
    @classmethod
    def _check_dashboard(cls, address: str | None) -> str | None:
        if address is None:
            return None
        host, _, port = address.rpartition(":")
        try:
            is_here = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            is_here = False
        if not is_here or not port.isdecimal() or int(port) > 65_535:
            raise ValueError(
                "expected an address that only this machine reaches, such as 127.0.0.1:8787, found "
                f"{address!r}: the dashboard has no password; from elsewhere, use ssh -L 8787:127.0.0.1:8787"
            )
        return address


class AddressClusterConfig(Section):
    """A Dask cluster that is already running."""

    kind: Literal["address"]
    address: str = Field(description="Address of its scheduler, such as tcp://10.0.0.5:8786.")
    timeout_seconds: float = Field(30, gt=0, description="How long to wait for the scheduler and its first worker.")
    region: str | None = Field(
        None, description="Region of the cluster, such as eu-west-3, for privacy.allowed_regions."
    )


class AdaptiveConfig(Section):
    """A cluster that grows and shrinks with its work."""

    minimum: int = Field(0, ge=0, description="Fewest workers.")
    maximum: int = Field(ge=1, description="Most workers.")

    @model_validator(mode="after")
    def _check_order(self) -> "AdaptiveConfig":
        if self.minimum > self.maximum:
            raise ValueError(f"adaptive.minimum ({self.minimum}) is larger than adaptive.maximum ({self.maximum})")
        return self


class CloudClusterConfig(Section):
    """Settings of Dask clusters in all clouds, which start with a run and end with it."""

    n_workers: int = Field(2, ge=1, description="Workers to start with.")
    docker_image: str = Field(
        min_length=1, description="Image with fruitdask that all machines run; see configs/docker/Dockerfile."
    )
    docker_args: str = Field("", repr=False, description="Further arguments of docker run.")
    spot: bool = Field(
        False, description="Run workers on spot machines: cheaper, and replaced when the cloud ends them."
    )
    extra_bootstrap: list[str] = Field([], repr=False, description="Shell commands before the container starts.")
    env_vars: dict[str, str] = Field({}, repr=False, description="Variables of the containers; never credentials.")
    worker_options: dict[str, Any] = Field({}, description="Options of the worker class, such as nthreads.")
    scheduler_options: dict[str, Any] = Field({}, description="Options of the scheduler.")
    worker_class: str = Field("dask.distributed.Nanny", description="Class of the workers, by its import path.")
    worker_module: str | None = Field(None, description="Module to run for workers instead of worker_class.")
    adaptive: AdaptiveConfig | None = Field(None, description="Grow and shrink between {minimum, maximum} workers.")
    start_timeout: Seconds = Field(600, description="How long to wait for the scheduler and the first worker.")
    idle_timeout: Seconds = Field(
        1200, description="Machines terminate themselves after this time without work or a client."
    )
    max_lifetime: Seconds = Field(43200, description="Machines terminate themselves after this time, whatever happens.")
    hourly_prices: dict[str, PositiveFloat] = Field(
        {}, description="US dollars per hour by type or size of machine (spot:TYPE for spot)."
    )

    @property
    def types(self) -> tuple[str, str]:
        """Types or sizes of the machines of the scheduler and of the workers."""
        raise NotImplementedError

    @property
    def has_gpu(self) -> bool:
        """Whether the workers have an NVIDIA GPU, by the name of their type or size."""
        raise NotImplementedError

    @property
    def max_workers(self) -> int:
        """The maximum number of workers."""
        return self.adaptive.maximum if self.adaptive else self.n_workers


class EC2ClusterConfig(CloudClusterConfig):
    """A Dask cluster on Amazon EC2 that starts for a run and ends with it.

    Most options have the names that ``dask_cloudprovider.aws.EC2Cluster`` gives them; where its defaults are harmful,
    ours differ.
    """

    kind: Literal["ec2"]
    region: str | None = Field(None, description="Region; null takes it from the AWS profile or environment.")
    availability_zone: str | list[str] | None = Field(None, description="Zone, or several; null lets AWS choose.")
    instance_type: str | None = Field(
        None, description="Type of all instances, instead of scheduler_instance_type and worker_instance_type."
    )
    scheduler_instance_type: str | None = Field(None, description="Type of the scheduler; null takes t3.medium.")
    worker_instance_type: str | None = Field(None, description="Type of the workers; null takes m6i.large.")
    iam_instance_profile: dict[str, str] | None = Field(
        None, description="Instance profile that lets workers read and write S3: {Name: ...} or {Arn: ...}."
    )
    ami: str | None = Field(None, description="Machine image; null finds Ubuntu (with NVIDIA drivers for GPUs).")
    bootstrap: bool | None = Field(
        None, description="Install Docker from docker.com on start, as EC2Cluster does; null installs it if missing."
    )
    vpc: str | None = Field(None, description="VPC; null takes the default one.")
    subnet_id: str | None = Field(None, description="Subnet; null takes one of the VPC.")
    security_groups: list[str] | None = Field(None, description="Security groups; null: one that admits this machine.")
    use_private_ip: bool = Field(False, description="Use private addresses only; instances get no public ones.")
    filesystem_size: int = Field(40, ge=8, description="Size of each instance's encrypted volume, in GB.")
    key_name: str | None = Field(None, description="SSH key pair for the instances.")
    enable_detailed_monitoring: bool = Field(False, description="Detailed monitoring by CloudWatch, which costs extra.")
    instance_tags: dict[str, str] = Field({}, description="Tags of the instances, in addition to those of fruitdask.")
    volume_tags: dict[str, str] = Field({}, description="Tags of the volumes, in addition to those of fruitdask.")
    client_cidr: str | None = Field(
        None,
        description="Addresses that the new security group admits to the scheduler; null asks AWS for this machine's.",
    )

    @model_validator(mode="after")
    def _check_instance_types(self) -> "EC2ClusterConfig":
        if self.instance_type and (self.scheduler_instance_type or self.worker_instance_type):
            raise ValueError("give instance_type, or scheduler_instance_type and worker_instance_type, not both")
        return self

    @property
    def types(self) -> tuple[str, str]:
        """Instance types of the scheduler and of the workers."""
        return (
            self.instance_type or self.scheduler_instance_type or "t3.medium",
            self.instance_type or self.worker_instance_type or "m6i.large",
        )

    @property
    def has_gpu(self) -> bool:
        """Whether the workers have an NVIDIA GPU, by the name of their type; those of g4ad are AMD's."""
        return re.match(r"(?!g4ad)(g|gr|p)\d", self.types[1]) is not None


class AzureClusterConfig(CloudClusterConfig):
    """A Dask cluster on virtual machines of Azure that starts for a run and ends with it.

    Most options have the names that ``dask_cloudprovider.azure.AzureVMCluster`` gives them; where its defaults are
    harmful, ours differ.
    """

    kind: Literal["azure"]
    location: str = Field(min_length=1, description="Location, such as westeurope.")
    resource_group: str = Field(min_length=1, description="Resource group of the network, and of all machines.")
    subscription_id: str | None = Field(None, description="Subscription; null takes AZURE_SUBSCRIPTION_ID.")
    vnet: str = Field(min_length=1, description="Virtual network in the resource group.")
    subnet: str | None = Field(None, description="Name of the subnet; null takes the first one.")
    security_group: str = Field(
        min_length=1, description="Network security group that admits this machine to the scheduler's port, 8786."
    )
    public_ingress: bool = Field(False, description="Give the scheduler a public address.")
    identity: str | None = Field(
        None,
        description="User-assigned identity, by name or id, by which machines read storage and delete themselves.",
    )
    vm_size: str = Field("Standard_D2s_v5", min_length=1, description="Size of the workers.")
    scheduler_vm_size: str = Field("Standard_B2s_v2", min_length=1, description="Size of the scheduler.")
    vm_image: dict[str, str] | None = Field(
        None, description="Machine image: {publisher, offer, sku, version} or {id}; null takes Ubuntu."
    )
    disk_size: int = Field(40, ge=30, le=1023, description="Size of each machine's disk, in GB.")
    encryption_at_host: bool = Field(
        False, description="Encrypt caches on the host too; the subscription must allow it."
    )
    tags: dict[str, str] = Field({}, description="Tags of all resources, in addition to that of fruitdask.")

    @field_validator("location")
    @classmethod
    def _normalize_location(cls, location: str) -> str:
        """Write "West Europe" as Azure's API does."""
        return location.replace(" ", "").lower()

    @property
    def types(self) -> tuple[str, str]:
        """Sizes of the machines of the scheduler and of the workers."""
        return self.scheduler_vm_size, self.vm_size

    @property
    def has_gpu(self) -> bool:
        """Whether the workers have an NVIDIA GPU, by the name of their size; NVv4 and MI300X are AMD's."""
        return re.match(r"(?i)standard_n[cdv](?!.*(as_v4|mi300))", self.vm_size) is not None

    @property
    def n_cpus(self) -> int:
        """The vCPUs of a worker, which are the first number in the name of its size."""
        found = re.search(r"_[A-Za-z]+(\d+)", self.vm_size)
        return int(found[1]) if found else 1


class CustomClusterConfig(Section):
    """A Dask cluster of any class, such as those of dask-jobqueue, that starts for a run and ends with it."""

    # `class` is a keyword of Python, so the field has another name.
    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["custom"]
    class_path: str = Field(alias="class", description="Import path of the class, such as dask_jobqueue.SLURMCluster.")
    options: dict[str, Any] = Field({}, repr=False, description="Keyword arguments of the class; never credentials.")
    n_workers: int | None = Field(None, ge=1, description="Workers; or give adaptive.")
    adaptive: AdaptiveConfig | None = Field(None, description="Grow and shrink between {minimum, maximum} workers.")
    start_timeout: Seconds = Field(600, description="How long to wait for the scheduler, then for the first worker.")
    region: str | None = Field(
        None, description="Region of the cluster, such as eu-west-3, for privacy.allowed_regions."
    )

    @field_validator("class_path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
            raise ValueError(f"expected an import path such as dask_jobqueue.SLURMCluster, found {path!r}")
        return path

    @model_validator(mode="after")
    def _check_workers(self) -> "CustomClusterConfig":
        if "n_workers" in self.options:
            raise ValueError("give the number of workers as cluster.n_workers, not in options")
        if (self.n_workers is None) == (self.adaptive is None):
            raise ValueError("give either n_workers or adaptive: {minimum: ..., maximum: ...}")
        return self

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"the cluster of class {self.class_path}"

    @property
    def n_first(self) -> int:
        """Workers to start with."""
        return self.n_workers or max(1, self.adaptive.minimum if self.adaptive else 1)

    @property
    def max_workers(self) -> int:
        """The maximum number of workers."""
        return self.adaptive.maximum if self.adaptive else self.n_first


ClusterConfig = Annotated[
    LocalClusterConfig | AddressClusterConfig | EC2ClusterConfig | AzureClusterConfig | CustomClusterConfig,
    Field(discriminator="kind"),
]
