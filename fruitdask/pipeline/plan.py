"""Estimates a run before it starts: time, memory, machines and money."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from fruitdask.cluster import choose_workers, open_client
from fruitdask.cluster.azure.roles import list_permissions
from fruitdask.cluster.cloud.prices import (
    PRICES_OF,
    Usage,
    compute_request_cost,
    compute_transfer_cost,
    find_hourly_price,
)
from fruitdask.cluster.ec2.machines import InstanceType, describe_types
from fruitdask.cluster.ec2.policies import list_actions
from fruitdask.cluster.regions import LOCAL, UNKNOWN
from fruitdask.core.config import AzureClusterConfig, CloudClusterConfig, Config, EC2ClusterConfig
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location
from fruitdask.errors import ClusterStartError
from fruitdask.pipeline.budget import compute_cluster_cost
from fruitdask.pipeline.inputs import Inputs
from fruitdask.pipeline.trial import Sample, try_images
from fruitdask.worker.models import resolve_engine, start_building

#: Instances need this many times the measured memory: the system takes some, and images differ.
_MEMORY_RESERVE = 1.5
#: From the launch of an instance until Dask runs on it: it boots, installs Docker and pulls an image of 2 to 3 GB.
#: Assumed.
_BOOT_SECONDS = 150.0
#: Slowdown of a thread whose neighbours are busy, measured with two workers on two cores.
_CROWDED = 1.25
#: Seconds at the end of every run, and further ones for each optional section; measured on 846 photographs.
_FINISH_SECONDS = 0.5
_SECTION_SECONDS = {"explore": 1.0, "quality": 1.5, "plots": 1.5, "report": 0.5}
#: Multiplications per second and core for principal components: 1,000,000 images of 1280 features took two cores 68 s.
_REDUCE_RATE = 1_000_000 * 1280**2 / (2 * 68)
#: How often the reduction reads the features: to fit, to project and to evaluate.
_N_FEATURE_READS = 3
#: Requests to an output on S3 per partition, as tests/benchmarks/s3_requests.py counts them.
_WRITES_PER_PARTITION, _READS_PER_PARTITION = 6, 18
#: Keys per page of a listing: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
_KEYS_PER_LISTING = 1000
#: vCPUs assumed for an instance if AWS could not be asked.
_FEWEST_CPUS = 2
#: Features of up to this size are reduced on the client: 26,000 images of 1280 features, which takes seconds and 0.4
#: GB.
LOCAL_REDUCE_BYTES = 128 * 1024**2


@dataclass(frozen=True)
class Machine:
    """Instances of one kind that a run starts."""

    role: str
    instance_type: str
    n_instances: int
    is_spot: bool
    region: str
    seconds: float
    #: US dollars per hour of each; None if no price is known.
    hourly_dollars: float | None
    #: Memory of each; None if AWS could not be asked.
    memory_bytes: int | None


@dataclass(frozen=True)
class Movement:
    """A transfer of bytes from one place to another."""

    what: str
    #: The region they come from, ``local`` or ``unknown``.
    source: str
    target: str
    n_bytes: int
    dollars: float


@dataclass(frozen=True)
class Plan:
    """
    What a run would compute, take and cost.

    Parameters
    ----------
    n_images : int
        Images.
    n_left : int
        Images that no earlier run has computed.
    n_bytes : int
        Bytes of all image files.
    n_classes : int
        Classes.
    images_per_partition : int
        Images per partition.
    n_features : int
        Features per image.
    n_workers : int
        Worker processes.
    threads_per_worker : int
        Threads of each.
    sample : Sample or None
        Measurements on some images; None if nothing is left to compute.
    seconds : dict[str, float]
        Expected seconds per stage.
    machines : tuple[Machine, ...]
        Instances to be started.
    regions : dict[str, str]
        Regions of input, output and cluster; all of them are allowed.
    movements : tuple[Movement, ...]
        Transfers between places.
    costs : dict[str, float]
        Expected US dollars by purpose.
    actions : tuple[str, ...]
        AWS actions that must be allowed.
    exceeded : tuple[str, ...]
        Limits that the run would exceed, in words.
    assumptions : tuple[str, ...]
        Assumptions behind the estimate.
    warnings : tuple[str, ...]
        Things to check before the run.
    """

    n_images: int
    n_left: int
    n_bytes: int
    n_classes: int
    images_per_partition: int
    n_features: int
    n_workers: int
    threads_per_worker: int
    sample: Sample | None
    seconds: dict[str, float]
    machines: tuple[Machine, ...]
    regions: dict[str, str]
    movements: tuple[Movement, ...]
    costs: dict[str, float]
    actions: tuple[str, ...]
    exceeded: tuple[str, ...]
    assumptions: tuple[str, ...] = field(repr=False)
    warnings: tuple[str, ...]

    @property
    def n_partitions(self) -> int:
        """Partitions."""
        return -(-self.n_images // self.images_per_partition)

    @property
    def features_bytes(self) -> int:
        """Bytes of all features, at most: the store compresses them."""
        return 4 * self.n_features * self.n_images

    @property
    def worker_bytes(self) -> int | None:
        """Memory that a worker needs; None if nothing was measured."""
        return None if self.sample is None else self.sample.count_bytes(self.threads_per_worker)

    @property
    def total_seconds(self) -> float:
        """Expected seconds from start to end."""
        return sum(self.seconds.values())

    @property
    def dollars(self) -> float:
        """Expected cost in US dollars."""
        return sum(self.costs.values())

    @property
    def dollars_per_million(self) -> float:
        """Expected US dollars for each further million images: without the start and the end of the run."""
        per_run = sum(self.costs[name] for name in ("instances", "volumes", "addresses"))
        share = self.seconds["featurize"] / (self.total_seconds - self.seconds["list"] or 1.0)
        return 1e6 * (share * per_run + self.costs["transfer"] + self.costs["requests"]) / max(1, self.n_left)

    def describe(self) -> dict[str, Any]:
        """
        Return the plan as JSON.

        Returns
        -------
        dict[str, Any]
            All of its values.
        """
        names = ("n_partitions", "features_bytes", "worker_bytes", "total_seconds", "dollars", "dollars_per_million")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Work:
    """The work of a run."""

    inputs: Inputs
    images_per_partition: int
    #: Images that no earlier run has computed.
    n_left: int
    list_seconds: float
    #: US dollars spent before interruptions.
    spent_dollars: float
    #: A cluster to use instead of the one that the configuration describes.
    client: Any = None

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.inputs.config

    @property
    def cloud(self) -> CloudClusterConfig | None:
        """The cluster in a cloud that would be started, if any."""
        cluster = self.config.cluster
        return cluster if isinstance(cluster, CloudClusterConfig) and self.client is None else None


def estimate(work: Work, progress: RunProgress) -> Plan:
    """Estimate a run from some of its images, which are fetched, decoded and predicted on this machine."""
    progress.begin("Measuring some images on this machine")
    with start_building(resolve_engine(work.config.model, work.config.cluster)) as wait_for_artifact:
        artifact = wait_for_artifact()
    sample = try_images(work.inputs, artifact) if work.n_left else None
    return Estimator(work, sample, n_features=artifact.n_features, input_px=artifact.input_px).build_plan()


def list_needed_actions(config: Config) -> set[str]:
    """List the actions that must be allowed on AWS and Azure."""
    actions = {permission.action for permission in list_actions(config)}
    return actions | {permission.action for permission in list_permissions(config)}


class Estimator:
    """Builds a plan."""

    def __init__(self, work: Work, sample: Sample | None, *, n_features: int, input_px: int) -> None:
        self._work = work
        self._config = work.config
        self._sample = sample
        self._n_features = n_features
        explore = work.config.explore
        self._n_reads = 2 if explore.enabled and explore.input_px not in (None, input_px) else 1
        self._n_left_partitions = -(-work.n_left // work.images_per_partition)
        self._warnings: list[str] = []

    def build_plan(self) -> Plan:
        """Build the plan."""
        work, catalog = self._work, self._work.inputs.catalog
        types = self._describe_types()
        n_workers, n_threads = self._count_workers(types)
        seconds = self._estimate_seconds(n_workers * n_threads)
        machines = tuple(self._list_machines(types, sum(seconds.values()) - work.list_seconds))
        movements = tuple(self._list_movements())
        costs = self._price(machines, movements)
        self._check_memory(machines, n_threads)
        return Plan(
            n_images=len(catalog),
            n_left=work.n_left,
            n_bytes=int(catalog["bytes"].sum()),
            n_classes=catalog["label"].nunique(),
            images_per_partition=work.images_per_partition,
            n_features=self._n_features,
            n_workers=n_workers,
            threads_per_worker=n_threads,
            sample=self._sample,
            seconds=seconds,
            machines=machines,
            regions=work.inputs.regions,
            movements=movements,
            costs=costs,
            actions=tuple(sorted(list_needed_actions(self._config))),
            exceeded=tuple(self._list_exceeded(seconds, costs)),
            assumptions=tuple(self._list_assumptions(types, costs)),
            warnings=tuple(self._warnings),
        )

    def _describe_types(self) -> Mapping[str, InstanceType]:
        """Ask AWS for the memory and cores of the instances; a plan is useful without an answer too."""
        cloud = self._work.cloud
        if isinstance(cloud, AzureClusterConfig) and cloud.identity is None:
            self._warnings.append(
                "without cluster.identity, machines cannot delete themselves, or read storage without keys: if this "
                "machine dies, they only stop, and cost money until you run fruitdask clusters cleanup --cloud azure"
            )
        if not isinstance(cloud, EC2ClusterConfig):
            return {}
        try:
            return describe_types(cloud.region, cloud.types)
        except ClusterStartError as error:
            self._warnings.append(f"{error}; so the memory of the instances was not checked")
            return {}

    def _count_workers(self, types: Mapping[str, InstanceType]) -> tuple[int, int]:
        """Count workers and the threads of each."""
        cluster, cloud = self._config.cluster, self._work.cloud
        if cloud is not None:
            worker_type = types.get(cloud.types[1])
            n_cpus = cloud.n_cpus if isinstance(cloud, AzureClusterConfig) else _FEWEST_CPUS
            n_cpus = worker_type.n_cpus if worker_type else n_cpus
            return cloud.max_workers, int(cloud.worker_options.get("nthreads", n_cpus))
        if cluster.kind == "local" and self._work.client is None:
            from dask.system import CPU_COUNT
            from distributed.system import MEMORY_LIMIT

            return choose_workers(cluster, n_cores=CPU_COUNT, memory_bytes=MEMORY_LIMIT)
        if cluster.kind == "custom" and self._work.client is None:
            self._warnings.append(f"{cluster.name} is not started for a plan: one thread per worker is assumed")
            return cluster.max_workers, 1
        with nullcontext(self._work.client) if self._work.client is not None else open_client(cluster) as client:
            threads = client.nthreads().values()
        return len(threads), max(threads)

    def _estimate_seconds(self, n_slots: int) -> dict[str, float]:
        """Estimate the seconds of the stages, on this many threads in total."""
        sample, work = self._sample, self._work
        if sample is None:
            return {"list": work.list_seconds, "start": 0.0, "featurize": 0.0, "finish": 0.0}
        boots = 2 * _BOOT_SECONDS if work.cloud else 0.0
        again = sample.image_seconds["fetch"] + sample.image_seconds["decode"] if self._n_reads > 1 else 0.0
        image_seconds = (_CROWDED if n_slots > 1 else 1.0) * (sum(sample.image_seconds.values()) + again)
        n_images = len(work.inputs.catalog)
        # With many threads and few partitions, some threads wait while others work on the last partitions.
        n_rounds = -(-self._n_left_partitions // n_slots)
        per_round = min(work.images_per_partition, work.n_left) * image_seconds + sample.partition_seconds
        sections = sum(each for name, each in _SECTION_SECONDS.items() if getattr(work.config, name).enabled)
        components = n_images * self._n_features * min(self._n_features, n_images) / _REDUCE_RATE / n_slots
        return {
            "list": work.list_seconds,
            "start": boots + sample.start_seconds,
            "featurize": n_rounds * per_round,
            "finish": components + _FINISH_SECONDS + sections,
        }

    def _list_machines(self, types: Mapping[str, InstanceType], seconds: float) -> Iterator[Machine]:
        """List the instances; workers are launched once the scheduler runs."""
        cloud = self._work.cloud
        if cloud is None or self._sample is None:
            return
        region = self._work.inputs.regions["cluster"]
        counts = {"scheduler": (1, False, seconds), "worker": (cloud.max_workers, cloud.spot, seconds - _BOOT_SECONDS)}
        for name, (role, (n_instances, is_spot, each_seconds)) in zip(cloud.types, counts.items(), strict=True):
            price = find_hourly_price(name, region=region, is_spot=is_spot, hourly_prices=cloud.hourly_prices)
            memory_bytes = types[name].memory_bytes if name in types else None
            yield Machine(role, name, n_instances, is_spot, region, each_seconds, price, memory_bytes)

    def _check_memory(self, machines: tuple[Machine, ...], n_threads: int) -> None:
        """Warn of workers that are too small."""
        needed = _MEMORY_RESERVE * (self._sample.count_bytes(n_threads) if self._sample else 0)
        for machine in machines:
            if machine.role == "worker" and machine.memory_bytes is not None and machine.memory_bytes < needed:
                self._warnings.append(
                    f"{machine.instance_type} has {machine.memory_bytes / 1e9:.1f} GB of memory, and a worker of "
                    f"{n_threads} threads needs "
                    f"about {needed / 1e9:.1f} GB with a reserve; take a larger cluster.worker_instance_type, or fewer "
                    "threads (cluster.worker_options: {nthreads: ...})"
                )

    def _list_movements(self) -> Iterator[Movement]:
        """List the transfers between places."""
        work = self._work
        n_images = len(work.inputs.catalog)
        n_bytes = int(work.inputs.catalog["bytes"].sum() * work.n_left / n_images)
        left_bytes, all_bytes = (4 * self._n_features * n for n in (work.n_left, n_images))
        yield self._move("images", "input", "cluster", self._n_reads * n_bytes)
        yield self._move("features", "cluster", "output", left_bytes)
        client_reduces = all_bytes <= LOCAL_REDUCE_BYTES
        yield self._move(
            "features, to be reduced", "output", "client" if client_reduces else "cluster", _N_FEATURE_READS * all_bytes
        )

    def _move(self, what: str, source: str, target: str, n_bytes: int) -> Movement:
        """Return the cost of transfers; only those that leave a region of AWS cost."""
        regions = {"client": LOCAL} | self._work.inputs.regions
        source_region, target_region = (self._find_aws_region(place) for place in (source, target))
        dollars = compute_transfer_cost(n_bytes, source=source_region, target=target_region)
        return Movement(what, regions[source], regions[target], n_bytes, dollars)

    def _find_aws_region(self, place: str) -> str | None:
        """Return the region of AWS of a place; None for anywhere else."""
        region = self._work.inputs.regions.get(place)
        if place in ("input", "output"):
            is_aws = self._is_on_s3(place)
        else:
            is_aws = place == "cluster" and isinstance(self._work.cloud, EC2ClusterConfig)
        return region if is_aws and region not in (LOCAL, UNKNOWN) else None

    def _is_on_s3(self, place: str) -> bool:
        """Whether a place is on Amazon S3, according to the configuration."""
        section = self._config.input if place == "input" else self._config.output
        options = section.storage_options
        is_elsewhere = "endpoint_url" in options or "endpoint_url" in options.get("client_kwargs", {})
        return Location(section.url).base.is_s3 and not is_elsewhere

    def _price(self, machines: tuple[Machine, ...], movements: tuple[Movement, ...]) -> dict[str, float]:
        """Add up the costs by purpose."""
        n_left, n_parts = self._work.n_left, self._n_left_partitions
        usages = [
            Usage(machine.instance_type, machine.is_spot, machine.region, machine.seconds)
            for machine in machines
            for _ in range(machine.n_instances)
        ]
        cost = compute_cluster_cost(self._config.cluster, usages)
        if cost.unpriced:
            names = ", ".join(cost.unpriced)
            self._warnings.append(f"no price of {names} is known, so it counts as 0; set cluster.hourly_prices")
        reads = (
            self._is_on_s3("input") * n_left * self._n_reads + self._is_on_s3("output") * n_parts * _READS_PER_PARTITION
        )
        is_listed = self._is_on_s3("input") and self._config.input.inventory is None
        listings = is_listed * -(-len(self._work.inputs.catalog) // _KEYS_PER_LISTING)
        writes = self._is_on_s3("output") * n_parts * _WRITES_PER_PARTITION
        return {
            "instances": cost.instances,
            "volumes": cost.volumes,
            "addresses": cost.addresses,
            "transfer": sum(movement.dollars for movement in movements),
            "requests": compute_request_cost(n_reads=reads, n_writes=listings + writes),
        }

    def _list_exceeded(self, seconds: dict[str, float], costs: dict[str, float]) -> Iterator[str]:
        """List the limits that would be exceeded."""
        limits, spent = self._config.limits, self._work.spent_dollars
        hours = sum(seconds.values()) / 3600
        if limits.max_hours is not None and hours > limits.max_hours:
            yield f"it would take about {hours:.2g} hours, and limits.max_hours is {limits.max_hours:g}"
        dollars = costs["instances"] + costs["volumes"] + costs["addresses"]
        if limits.max_cost is not None and dollars and spent + dollars > limits.max_cost:
            before = f" after ${spent:.2f} already spent" if spent else ""
            yield f"its instances would cost about ${dollars:.2f}{before}, and limits.max_cost is ${limits.max_cost:g}"

    def _list_assumptions(self, types: Mapping[str, InstanceType], costs: dict[str, float]) -> Iterator[str]:
        """List the assumptions behind the estimate."""
        cloud, config = self._work.cloud, self._config
        if config.input.inventory is not None:
            yield "the images are those of input.inventory, so input.url is not listed"
        if self._sample is not None:
            yield (
                "a thread there is as fast as a core here, a quarter slower when all are busy, and files arrive as "
                "fast as here"
            )
        if any(instance_type.has_gpu for instance_type in types.values()):
            yield "GPUs count as cores of this machine, although they are faster"
        if cloud is not None:
            yield (
                f"an instance is ready {_BOOT_SECONDS:g} s after its launch, and workers are launched when the "
                "scheduler is ready"
            )
            yield from self._list_price_assumptions(cloud)
        if costs["transfer"]:
            yield "this machine is not on AWS"
        if config.reduce.enabled and config.reduce.tsne.enabled:
            yield "the time of t-SNE is not included"

    def _list_price_assumptions(self, cloud: CloudClusterConfig) -> Iterator[str]:
        """List the assumptions behind the prices."""
        if isinstance(cloud, EC2ClusterConfig):
            yield (
                f"prices are those of cluster.hourly_prices, else of {PRICES_OF}, without taxes, free tiers and t3's "
                "surplus credits"
            )
        else:
            yield (
                "prices are those of cluster.hourly_prices, without disks, addresses and transfers; a worker has as "
                "many vCPUs as the name of its size says"
            )
        if cloud.spot and not any(name.startswith("spot:") for name in cloud.hourly_prices):
            yield "spot instances are counted at the on-demand price, which is their maximum"
        if cloud.adaptive:
            yield "all workers run all the time"
