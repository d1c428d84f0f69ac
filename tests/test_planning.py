"""Plans of runs, their limits and their cost; EC2 is the loopback EC2."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from loopback_ec2 import LoopbackEC2
from machines import read_plan
from runs import MakeConfig, configure

import fruitdask
from fruitdask import store
from fruitdask.cli import cli
from fruitdask.cli.summary import _advise, _compute_shares, _format_cost
from fruitdask.core.config import EC2ClusterConfig, LimitsConfig, LocalClusterConfig, ModelConfig
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError, LimitError
from fruitdask.pipeline import budget
from fruitdask.pipeline.budget import Budget
from fruitdask.pipeline.inputs import Inputs
from fruitdask.pipeline.plan import Estimator, Plan, Work
from fruitdask.pipeline.trial import Sample
from fruitdask.store.schema import CostRecord
from fruitdask.worker.fetch import ImageSource

needs_loopback = pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc")

#: 20 ms per image, and 100 ms per partition.
SAMPLE = Sample(
    n_images=32,
    n_failed=0,
    image_seconds={"fetch": 0.001, "decode": 0.006, "predict": 0.010, "explore": 0.003},
    partition_seconds=0.1,
    start_seconds=4.0,
    base_bytes=1_000_000_000,
    thread_bytes=500_000_000,
)
EC2: dict[str, Any] = {
    "kind": "ec2",
    "docker_image": "any",
    "client_cidr": "127.0.0.1/32",
    "n_workers": 2,
    "worker_options": {"nthreads": 1},
}


@pytest.fixture
def make_config(tiny_model: ModelConfig, sample_folder: Path, tmp_path: Path) -> MakeConfig:
    """Make the configuration of a run of the tiny model on the drawn images, with the settings of a test."""
    cluster = {"kind": "local", "n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    return lambda **sections: configure(sample_folder, tmp_path / "out", tiny_model, **{"cluster": cluster} | sections)


@pytest.fixture(scope="module")
def cloud(sample_folder: Path) -> Iterator[LoopbackEC2]:
    """A loopback EC2 and S3 in eu-west-1, with the drawn images in a bucket there and in another in us-east-1."""
    with LoopbackEC2() as cloud:
        with cloud.client("s3") as client:
            for bucket in ("photos", "results"):
                here = {"LocationConstraint": cloud.region}
                client.create_bucket(Bucket=bucket, CreateBucketConfiguration=here)
        keys = {"aws_access_key_id": "client", "aws_secret_access_key": "any"}
        with closing(boto3.client("s3", endpoint_url=cloud.endpoint_url, region_name="us-east-1", **keys)) as client:
            client.create_bucket(Bucket="far")
        with cloud.client("s3") as client:
            for path in sorted(sample_folder.rglob("*.jpg")):
                for bucket in ("photos", "far"):
                    client.upload_file(str(path), bucket, f"fruits/{path.relative_to(sample_folder)}")
        yield cloud


def list_objects(cloud: LoopbackEC2, bucket: str) -> list[str]:
    """List the keys of a bucket."""
    with cloud.client("s3") as client:
        return [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ())]


def count_launches(cloud: LoopbackEC2) -> int:
    """Count requests for instances."""
    return sum(call.action == "RunInstances" for call in cloud.calls)


def build_plan(
    sections: dict[str, Any],
    *,
    n_images: int = 1000,
    n_left: int | None = None,
    regions: dict[str, str],
    spent: float = 0.0,
) -> Plan:
    """Build the plan of made-up images of 200 kB, 100 per partition, 1280 features."""
    config = fruitdask.load_config(sections)
    catalog = pd.DataFrame(
        {"path": [f"a/{n}.jpg" for n in range(n_images)], "label": "a", "bytes": 200_000, "version": ""}
    )
    source = ImageSource(Location(config.input.url), batch_size=8, max_pixels=1, fetch_attempts=1, concurrent_reads=1)
    inputs = Inputs(config, source, Location(config.output.url), catalog, regions)
    n_left = n_images if n_left is None else n_left
    work = Work(inputs, images_per_partition=100, n_left=n_left, list_seconds=2.0, spent_dollars=spent)
    return Estimator(work, SAMPLE if n_left else None, n_features=1280, input_px=224).build_plan()


@pytest.mark.slow
def test_plan_of_a_local_run_is_complete_and_writes_nothing(
    make_config: MakeConfig, sample_folder: Path, tmp_path: Path
) -> None:
    found = fruitdask.plan(make_config(explore={"enabled": True}))
    assert (found.n_images, found.n_left, found.n_classes, found.n_partitions) == (24, 24, 6, 5)
    assert found.n_bytes == sum(path.stat().st_size for path in sample_folder.rglob("*.jpg"))
    assert (found.n_features, found.features_bytes) == (6, 24 * 6 * 4)
    assert (found.n_workers, found.threads_per_worker) == (1, 2)
    assert found.sample is not None and (found.sample.n_images, found.sample.n_failed) == (8, 0)
    assert all(value > 0 for value in found.sample.image_seconds.values()) and found.sample.partition_seconds > 0
    assert found.worker_bytes == found.sample.base_bytes + 2 * found.sample.thread_bytes
    assert 50e6 < found.sample.base_bytes < 5e9 and 0 < found.sample.thread_bytes < 5e9
    assert found.total_seconds == sum(found.seconds.values()) > 0
    assert (found.machines, found.dollars, found.actions, found.exceeded, found.warnings) == ((), 0, (), (), ())
    assert found.regions == {"input": "local", "output": "local", "cluster": "local"}
    assert json.loads(json.dumps(found.describe()))["n_partitions"] == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_plan_counts_what_an_earlier_run_has_done(make_config: MakeConfig, client: Any) -> None:
    class Interrupted(RunProgress):
        def advance(self, n_images: int, *, failures: Mapping[str, int]) -> None:
            raise KeyboardInterrupt("in this test")

    config = make_config(featurize={"images_per_partition": 1})
    with pytest.raises(KeyboardInterrupt, match="in this test"):
        fruitdask.run(config, client=client, progress=Interrupted())
    n_done = len(store.list_committed(Location(config.output.url)))
    interrupted = fruitdask.plan(config)
    assert 0 < n_done < 24 and interrupted.n_left <= 24 - n_done
    fruitdask.run(config, client=client)
    finished = fruitdask.plan(config)
    assert (finished.n_left, finished.sample, finished.worker_bytes) == (0, None, None)
    assert finished.seconds["featurize"] == finished.seconds["start"] == 0


def test_plan_asks_a_cluster_that_runs_for_its_workers(make_config: MakeConfig, client: Any) -> None:
    address = {"kind": "address", "address": client.scheduler.address}
    sections = make_config().model_dump() | {"cluster": address}
    found = fruitdask.plan(fruitdask.load_config(sections))
    assert (found.n_workers, found.threads_per_worker) == (2, 2)


def test_expected_seconds_follow_from_the_sample() -> None:
    local = {"n_workers": 3, "threads_per_worker": 2}
    sections = {"input": {"url": "/in"}, "output": {"url": "/out"}, "cluster": local}
    regions = {"input": "local", "output": "local", "cluster": "local"}
    found = build_plan(sections, regions=regions)
    # Ten partitions on six threads are two rounds of 100 images, which take a quarter longer when threads share the
    # machine.
    assert found.seconds["featurize"] == pytest.approx(2 * (100 * 1.25 * 0.020 + 0.1))
    assert (found.seconds["list"], found.seconds["start"]) == (2.0, 4.0)
    assert found.worker_bytes == 2_000_000_000
    assert build_plan(sections, n_left=550, regions=regions).seconds["featurize"] == pytest.approx(2.6)
    # Images that are compared at a size that differs from the network's are read again.
    apart = build_plan(sections | {"explore": {"input_px": 96}}, regions=regions)
    assert apart.seconds["featurize"] == pytest.approx(2 * (100 * 1.25 * 0.027 + 0.1))
    assert [movement.n_bytes for movement in (found.movements[0], apart.movements[0])] == [200_000_000, 400_000_000]
    few, many = (build_plan(sections, n_images=n, regions=regions).seconds["finish"] for n in (10_000, 1_000_000))
    assert few < 10 < many < 60


@pytest.mark.cloud
@needs_loopback
def test_expected_cost_equals_arithmetic_by_hand(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.use(monkeypatch)
    prices = {"t3.medium": 0.05, "m6i.large": 0.20, "spot:m6i.large": 0.10}
    cluster = {**EC2, "region": "eu-west-1", "spot": True, "hourly_prices": prices, "filesystem_size": 30}
    sections = {"input": {"url": "s3://far/in"}, "output": {"url": "s3://results/out"}, "cluster": cluster}
    regions = {"input": "us-east-1", "output": "eu-west-1", "cluster": "eu-west-1"}
    found = build_plan(sections | {"limits": {"max_cost": 0.02, "max_hours": 0.05}}, regions=regions, spent=0.01)
    running = found.total_seconds - 2
    scheduler, worker = found.machines
    assert (scheduler.seconds, worker.seconds) == (pytest.approx(running), pytest.approx(running - 150))
    assert (worker.n_instances, worker.hourly_dollars, worker.memory_bytes) == (2, 0.10, 8 * 1024**3)
    seconds = scheduler.seconds + 2 * worker.seconds
    expected = {
        "instances": (0.05 * scheduler.seconds + 0.10 * 2 * worker.seconds) / 3600,
        "volumes": 0.0952 * 30 * seconds / (30 * 86400),
        "addresses": 0.005 * seconds / 3600,
        # The images to another region, and the features three times to the client.
        "transfer": 0.02 * 0.2 + 0.09 * 3 * 1000 * 1280 * 4 / 1e9,
        "requests": (1000 + 10 * 18) * 0.00043 / 1000 + (1 + 10 * 6) * 0.0054 / 1000,
    }
    named = build_plan(sections | {"input": {"url": "s3://far/in", "inventory": "s3://far/all.csv"}}, regions=regions)
    assert found.costs["requests"] - named.costs["requests"] == pytest.approx(0.0054 / 1000)
    assert found.costs == pytest.approx(expected) and found.dollars == pytest.approx(sum(expected.values()))
    busy = found.seconds["featurize"] / running
    paid = busy * (expected["instances"] + expected["volumes"] + expected["addresses"])
    assert found.dollars_per_million == pytest.approx(1000 * (paid + expected["transfer"] + expected["requests"]))
    hours, cost = found.exceeded
    assert f"about {found.total_seconds / 3600:.2g} hours, and limits.max_hours is 0.05" in hours
    assert "after $0.01 already spent, and limits.max_cost is $0.02" in cost
    assert found.warnings == () and "ec2:RunInstances" in found.actions and count_launches(cloud) == 0


@pytest.mark.cloud
@needs_loopback
def test_plan_warns_about_problems(cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.use(monkeypatch)
    sections = {"input": {"url": "s3://photos/in"}, "output": {"url": "s3://results/out"}}
    regions = dict.fromkeys(("input", "output", "cluster"), "eu-west-1")
    small = {"kind": "ec2", "docker_image": "any", "worker_instance_type": "t3.small"}
    unpriced, memory = build_plan(sections | {"cluster": small}, regions=regions).warnings
    assert "no price of t3.small in eu-west-1 is known" in unpriced
    assert "t3.small has 2.1 GB of memory, and a worker of 2 threads needs about 3.0 GB" in memory
    missing = {"kind": "ec2", "docker_image": "any", "worker_instance_type": "p9.huge", "hourly_prices": {"p9.huge": 1}}
    (unknown,) = build_plan(sections | {"cluster": missing}, regions=regions).warnings
    assert "no instance type p9.huge" in unknown and "was not checked" in unknown


def test_plan_on_azure_uses_the_prices_of_the_configuration() -> None:
    places = dict.fromkeys(("resource_group", "vnet", "security_group", "docker_image"), "any")
    cluster = {"kind": "azure", "location": "westeurope", "n_workers": 3, "vm_size": "Standard_D4s_v5", **places}
    sections = {"input": {"url": "abfs://photos/in"}, "output": {"url": "abfs://results/out"}, "cluster": cluster}
    regions = dict.fromkeys(("input", "output", "cluster"), "westeurope")
    found = build_plan(sections, regions=regions)
    identity, unpriced = found.warnings
    assert "without cluster.identity, machines cannot delete themselves" in identity
    assert "no price of Standard_B2s_v2 in westeurope, Standard_D4s_v5 in westeurope is known" in unpriced
    assert (found.n_workers, found.threads_per_worker, found.dollars) == (3, 4, 0)
    cluster |= {"identity": "id", "spot": True, "hourly_prices": {"Standard_B2s_v2": 0.1, "spot:Standard_D4s_v5": 0.2}}
    found = build_plan(sections | {"limits": {"max_cost": 0.001}}, regions=regions)
    scheduler, worker = found.machines
    expected = (0.1 * scheduler.seconds + 3 * 0.2 * worker.seconds) / 3600
    assert found.dollars == pytest.approx(expected) and found.warnings == ()
    assert "Microsoft.Compute/virtualMachines/write" in found.actions and len(found.exceeded) == 1


@pytest.mark.slow
@pytest.mark.cloud
@needs_loopback
def test_plan_on_ec2_starts_nothing_and_writes_nothing(
    make_config: MakeConfig, cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.use(monkeypatch)
    config = make_config(input={"url": "s3://far/fruits"}, output={"url": "s3://results/planned"})
    found = fruitdask.plan(fruitdask.load_config(config.model_dump() | {"cluster": EC2}))
    assert (found.n_images, found.n_workers, found.threads_per_worker) == (24, 2, 1)
    assert found.regions == {"input": "us-east-1", "output": "eu-west-1", "cluster": "eu-west-1"}
    assert found.movements[0].dollars == pytest.approx(0.02 * found.n_bytes / 1e9)
    assert [machine.hourly_dollars for machine in found.machines] == [0.0456, 0.107]
    assert count_launches(cloud) == 0 and list_objects(cloud, "results") == []


@pytest.fixture
def write_config(make_config: MakeConfig, tmp_path: Path) -> Callable[..., str]:
    """Write a configuration file."""

    def write(**settings: dict[str, Any]) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(make_config(**settings).model_dump(mode="json", exclude_defaults=True)))
        return str(path)

    return write


@pytest.mark.slow
def test_plan_command_prints_rows_or_json(write_config: Callable[..., str], sample_folder: Path) -> None:
    path = write_config(limits={"max_hours": 10}, privacy={"allowed_regions": "eu"})
    shown = CliRunner().invoke(cli, ["plan", path])
    assert shown.exit_code == 0, shown.output
    for expected in (
        "24 in 6 classes",
        "5 of 5 images",
        "8 images here: fetch",
        "1 of 2 threads",
        "input local, output local, cluster local; all allowed (eu)",
        "nothing to AWS",
        "max_hours 10: the run stays within them",
    ):
        assert expected in shown.stdout
    as_json = CliRunner().invoke(cli, ["plan", path, "--json"])
    assert json.loads(as_json.stdout)["n_images"] == 24


@pytest.mark.slow
def test_limit_that_a_run_would_exceed_refuses_it(write_config: Callable[..., str], tmp_path: Path) -> None:
    path = write_config(limits={"max_hours": 1e-4})
    planned, started = (CliRunner().invoke(cli, [command, path]) for command in ("plan", "run"))
    assert planned.exit_code == 4 and "the run would not be started: it would take about" in planned.stderr
    assert "24 in 6 classes" in planned.stdout
    assert started.exit_code == 4 and "the run was not started: it would take about" in started.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.cloud
@needs_loopback
def test_cost_that_a_run_would_exceed_refuses_it(
    make_config: MakeConfig, cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.use(monkeypatch)
    config = make_config(input={"url": "s3://photos/fruits"}, output={"url": "s3://results/refused"})
    limited = {"limits": {"max_cost": 0.01}, "cluster": EC2}
    with pytest.raises(LimitError, match=r"not started: .*cost about \$0.0\d, and .*max_cost is \$0.01"):
        fruitdask.run(fruitdask.load_config(config.model_dump() | limited))
    unpriced = {"limits": {"max_cost": 1}, "cluster": {**EC2, "worker_instance_type": "m6a.large"}}
    for start in (fruitdask.plan, fruitdask.run):
        with pytest.raises(ConfigError, match="needs a price for m6a.large in eu-west-1.*hourly_prices"):
            start(fruitdask.load_config(config.model_dump() | unpriced))
    assert count_launches(cloud) == 0 and list_objects(cloud, "results") == []


@pytest.mark.cloud
@needs_loopback
def test_residency_is_checked_before_anything_is_read(
    write_config: Callable[..., str], cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.use(monkeypatch)
    n_read = sum(call.action in ("GetObject", "ListObjectsV2") for call in cloud.calls)
    path = write_config(input={"url": "s3://far/fruits"}, privacy={"allowed_regions": "eu"})
    refused = CliRunner().invoke(cli, ["plan", path])
    assert refused.exit_code == 4 and "the bucket far is in us-east-1" in refused.stderr
    assert sum(call.action in ("GetObject", "ListObjectsV2") for call in cloud.calls) == n_read


class Hours(RunProgress):
    """A run in which each partition takes an hour, by the clock of its budget."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._seconds = 0.0
        patch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: self._seconds, perf_counter=time.perf_counter))

    def advance(self, n_images: int, *, failures: Mapping[str, int]) -> None:
        """Let an hour pass."""
        self._seconds += 3600


@pytest.mark.slow
def test_run_that_exceeds_a_limit_ends_and_can_be_resumed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More partitions than may be in flight at once.
    limited = make_config(limits={"max_hours": 1.5}, featurize={"images_per_partition": 1})
    with monkeypatch.context() as patch, pytest.raises(
        LimitError, match="has taken 2 hours, and limits.max_hours is 1.5; results so"
    ):
        fruitdask.run(limited, progress=Hours(patch))
    n_done = len(store.list_committed(Location(limited.output.url)))
    assert 2 <= n_done < 24
    result = fruitdask.run(make_config(limits={"max_hours": 10}))
    assert result.manifest["status"] == "complete" and result.n_computed == 24 - n_done
    assert "cost" not in result.manifest


@pytest.mark.slow
@pytest.mark.cloud
@needs_loopback
def test_cost_of_a_run_on_ec2_is_in_the_manifest_with_that_of_its_interrupted_parts(
    make_config: MakeConfig, cloud: LoopbackEC2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud.use(monkeypatch)
    output = {"url": "s3://results/paid"}
    # More partitions than may be in flight at once, so that some are left for the second part.
    config = make_config(
        input={"url": "s3://photos/fruits", "limit": 8}, output=output, featurize={"images_per_partition": 1}
    ).model_dump()
    cluster = {**EC2, "n_workers": 1, "hourly_prices": {"m6i.large": 0.36}, "filesystem_size": 10}
    first, second = (
        fruitdask.load_config(config | {"cluster": cluster, "limits": limits})
        for limits in ({"max_hours": 1.5, "max_cost": 100}, {"max_cost": 100})
    )
    with monkeypatch.context() as patch, pytest.raises(LimitError, match="limits.max_hours is 1.5"):
        fruitdask.run(first, progress=Hours(patch))
    assert cloud.wait_until_quiet(60)
    lifetimes = {read_plan(instance.user_data).lifetime_minutes for instance in cloud.instances(None)}
    assert lifetimes == {90}
    # A machine that ran for less than a minute is billed for one.
    each = 60 / 3600 * 0.005 + 0.0952 * 10 * 60 / (30 * 86400)
    paid = 60 / 3600 * (0.0456 + 0.36) + 2 * each
    interrupted = store.read_run(Location(output["url"]))
    assert (
        interrupted is not None
        and interrupted.cost is not None
        and interrupted.cost.dollars == pytest.approx(paid, abs=1e-5)
    )
    result = fruitdask.run(second)
    assert cloud.wait_until_quiet(60)
    cost = result.manifest["cost"]
    assert cost["dollars"] == pytest.approx(2 * paid, abs=1e-5)
    assert cost["prices_of"] == "configuration, else January 2026"
    assert {name: figures["seconds"] for name, figures in cost["instances"].items()} == {
        "t3.medium": 120,
        "m6i.large": 120,
    }
    assert sum(figures["dollars"] for figures in cost["instances"].values()) == pytest.approx(2 * paid, abs=1e-5)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(second.model_dump(mode="json", exclude_defaults=True)))
    shown = CliRunner().invoke(cli, ["run", str(path)])
    assert f"${2 * paid:.2f} for 0.07 hours of instances, by prices of configuration, else January 2026" in shown.stdout
    many = _format_cost(cost | {"dollars": 3.0}, n_images=2_000_000)
    assert many.startswith("$3.00 for 0.07 hours of instances ($1.50 per million images), by prices of")


def configure_budget(cost: float, **limits: float) -> Budget:
    """Configure a budget of a cluster on EC2, part of which is spent."""
    cluster = EC2ClusterConfig(kind="ec2", docker_image="any")
    spent = CostRecord(dollars=cost, instances={"m6i.large": {"seconds": 3600, "dollars": cost}})
    return Budget(LimitsConfig(**limits), cluster, region="eu-west-1", spent=spent, elapsed_seconds=7200)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_cost": 2.0}, r"have cost \$2.50, and limits.max_cost is \$2; results so far are kept; raise the limit"),
        ({"max_hours": 1.5}, "has taken 2 hours, and limits.max_hours is 1.5"),
    ],
    ids=["cost", "hours"],
)
def test_used_up_budget_opens_no_cluster(limits: dict[str, float], expected: str) -> None:
    budget = configure_budget(2.5, **limits)
    with pytest.raises(LimitError, match=expected), budget.open_client():
        pass
    spent = budget.describe()
    assert spent is not None and spent.dollars == 2.5


def test_budget_within_its_limits_does_not_stop_a_run() -> None:
    configure_budget(2.5, max_cost=2.6, max_hours=2.1).check()


def test_cluster_that_costs_nothing_has_no_cost() -> None:
    budget = Budget(LimitsConfig(max_cost=1), LocalClusterConfig(), region="local", spent=None, elapsed_seconds=0)
    budget.check()
    assert budget.describe() is None and budget.spent_dollars == 0


@pytest.mark.parametrize(
    ("spent", "engine", "expected"),
    [
        (
            {"decode": 120.0, "predict": 70.0},
            "openvino",
            "decoding took longest: set featurize.decode: fast, or use more",
        ),
        ({"fetch": 180.0, "predict": 9.0}, "openvino", "reading files took longest: raise featurize.concurrent_reads"),
        ({"decode": 50.0, "predict": 130.0}, "tensorflow", "the network took longest: install fruitdask[openvino]"),
        ({"decode": 10.0, "predict": 20.0}, "openvino", "workers waited longest: lower featurize.images_per_partition"),
        ({"decode": 80.0, "predict": 80.0, "write": 40.0}, "openvino", "decoding took longest"),
        ({"decode": 70.0, "predict": 70.0, "write": 60.0}, "openvino", ""),
        ({}, "openvino", ""),
    ],
    ids=["decode", "fetch", "network", "idle", "even at the bound", "nothing for long", "nothing computed"],
)
def test_summary_says_what_limited_a_long_run(spent: dict[str, float], engine: str, expected: str) -> None:
    manifest = {
        "seconds": {"featurize": 100.0, "worker": spent},
        "cluster": {"n_threads": 2},
        "config": {"featurize": {"decode": "exact"}},
        "model": {"engine": engine},
    }
    advice = _advise(_compute_shares(manifest), manifest)
    assert advice.startswith(expected) and bool(advice) == bool(expected)
    manifest["seconds"]["featurize"] = 59.0
    manifest["cluster"]["n_threads"] = 4
    assert not _advise(_compute_shares(manifest), manifest)
