"""Instance types, the zones that offer them, and machine images."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fruitdask.cluster.ec2.instances import open_ec2
from fruitdask.errors import ClusterStartError

#: Owner and name of machine images, by architecture and whether they have NVIDIA's drivers; ``*`` is the build date.
#: From Canonical: https://documentation.ubuntu.com/aws/
#: From AWS, with Docker: https://docs.aws.amazon.com/dlami/latest/devguide/find-dlami-id.html
_IMAGES = {
    ("x86_64", False): ("099720109477", "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*"),
    ("arm64", False): ("099720109477", "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-arm64-server-*"),
    ("x86_64", True): ("amazon", "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) *"),
    ("arm64", True): ("amazon", "Deep Learning ARM64 Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) *"),
}


@dataclass(frozen=True)
class InstanceType:
    """An instance type."""

    name: str
    n_cpus: int
    memory_bytes: int
    #: NVIDIA GPUs; others cannot run networks here.
    n_gpus: int
    architecture: str

    @property
    def has_gpu(self) -> bool:
        """Whether it has an NVIDIA GPU."""
        return self.n_gpus > 0


@dataclass(frozen=True)
class Image:
    """A machine image (AMI)."""

    id: str
    #: Name of the root volume, such as ``/dev/sda1``: another name would add a second volume.
    root_device_name: str
    #: Minimum size of the root volume, in GB.
    root_volume_gb: int


def describe_types(
    region: str | None, names: Collection[str], *, zones: Collection[str] = ()
) -> dict[str, InstanceType]:
    """Look up instance types, and check that they are available."""
    wanted = sorted(set(names))
    with open_ec2(region, action=f"look up the instance types {', '.join(wanted)}") as client:
        offered = defaultdict(set)
        # First, because the errors of EC2 about a type that it does not offer differ between regions.
        pages = client.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": wanted}]
        )
        for page in pages:
            for offer in page["InstanceTypeOfferings"]:
                offered[offer["InstanceType"]].add(offer["Location"])
        for name in wanted:
            _check_offer(name, offered[name], zones, client.meta.region_name)
        entries = client.describe_instance_types(InstanceTypes=wanted)["InstanceTypes"]
    return {entry["InstanceType"]: _describe_type(entry) for entry in entries}


def find_image(region: str | None, *, architecture: str, has_gpu: bool, ami: str | None = None) -> Image:
    """Find the given machine image, by default Ubuntu, for GPUs with NVIDIA's drivers and Docker."""
    owner, name = _IMAGES[architecture, has_gpu]
    by_name = {"Owners": [owner], "Filters": [{"Name": "name", "Values": [name]}]}
    with open_ec2(region, action=f"find the machine image {ami or name}") as client:
        found = client.describe_images(**{"ImageIds": [ami]} if ami else by_name)["Images"]
        where = client.meta.region_name
    if not found:
        drivers = " with NVIDIA's drivers" if has_gpu else ""
        raise ClusterStartError(
            f"found no machine image {ami or repr(name)} in {where}; set cluster.ami to an Ubuntu image{drivers}"
        )
    newest = max(found, key=lambda entry: str(entry["CreationDate"]))
    root = newest["RootDeviceName"]
    volumes = {volume["DeviceName"]: volume.get("Ebs", {}) for volume in newest["BlockDeviceMappings"]}
    return Image(newest["ImageId"], root, volumes.get(root, {}).get("VolumeSize", 0))


def _check_offer(name: str, offered: set[str], zones: Collection[str], region: str) -> None:
    """Refuse a type that is not available in the region, or not in all wanted zones."""
    if not offered:
        raise ClusterStartError(
            f"EC2 has no instance type {name} in {region}; set another cluster.worker_instance_type and "
            "cluster.scheduler_instance_type (or cluster.instance_type)"
        )
    if missing := sorted(set(zones) - offered):
        raise ClusterStartError(
            f"{', '.join(missing)} does not offer the instance type {name}, but {', '.join(sorted(offered))} does; "
            "set cluster.availability_zone (and cluster.subnet_id), or another type"
        )


def _describe_type(entry: dict[str, Any]) -> InstanceType:
    """Convert EC2's description of an instance type."""
    gpus = entry.get("GpuInfo", {}).get("Gpus", ())
    return InstanceType(
        name=entry["InstanceType"],
        n_cpus=entry["VCpuInfo"]["DefaultVCpus"],
        memory_bytes=entry["MemoryInfo"]["SizeInMiB"] * 1024**2,
        n_gpus=sum(gpu["Count"] for gpu in gpus if gpu.get("Manufacturer") == "NVIDIA"),
        architecture="arm64" if "arm64" in entry["ProcessorInfo"]["SupportedArchitectures"] else "x86_64",
    )
