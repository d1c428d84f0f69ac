"""One cluster on the loopback Azure in detail: its machines, their data and protection, and what it costs."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask.config
import pytest
import yaml
from azure_clusters import check_nothing_left, configure, describe
from azure_machines import Machine
from azure_proxy import Call
from cluster_events import PATIENCE_SECONDS
from loopback_azure import LoopbackAzure

import fruitdask
from fruitdask.cluster import list_usage, open_client
from fruitdask.cluster.azure.machines import list_instances, open_arm
from fruitdask.cluster.azure.roles import build_roles
from fruitdask.cluster.cloud.instances import Instance
from fruitdask.cluster.cloud.prices import Usage

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc"),
]

SECRET = "planted-4f1c"


@dataclass
class Run:
    """Observations of a run, during it and afterwards."""

    client: Any
    greeting: str | None
    threshold: str | None
    workers: list[dict[str, Any]]
    machines: list[Machine]
    interfaces: list[dict[str, Any]]
    resources: list[str]
    tags: list[dict[str, str]]
    usage: list[Usage]
    listed: list[Instance]
    calls: list[Call]


async def observe_run(cloud: LoopbackAzure) -> Run:
    """Start two workers inside a running event loop, as a notebook would, and observe them."""
    config = configure(
        location="West Europe",
        n_workers=2,
        spot=True,
        public_ingress=True,
        encryption_at_host=True,
        env_vars={"GREETING": "good day: # 1"},
        extra_bootstrap=["echo 'a: b' # c"],
        tags={"team": "fruits"},
    )
    with open_client(config) as client, open_arm("fruits", subscription=None, action="look") as arm:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        machines = cloud.alive()
        return Run(
            client=client,
            greeting=client.submit(os.getenv, "GREETING").result(PATIENCE_SECONDS),
            threshold=client.submit(os.getenv, "MALLOC_TRIM_THRESHOLD_").result(PATIENCE_SECONDS),
            workers=list(client.scheduler_info(n_workers=-1)["workers"].values()),
            machines=machines,
            interfaces=[cloud.find(f"{machine.name}-network-interface") for machine in machines],
            resources=cloud.list_resources(),
            tags=[cloud.find(name)["tags"] for name in cloud.list_resources() if not name.startswith("disks")],
            usage=list_usage(client),
            listed=list_instances(arm),
            calls=cloud.calls,
        )


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Observe a run, with a secret in the user's Dask settings."""
    with LoopbackAzure() as cloud, pytest.MonkeyPatch.context() as patch:
        cloud.use(patch)
        with dask.config.set({"cloudprovider.digitalocean.token": SECRET}):
            run = asyncio.run(observe_run(cloud))
        check_nothing_left(cloud)
    yield run


def test_cluster_computes_over_tls(run: Run) -> None:
    """Tasks run on the machines with the configured environment, even if the client runs in an event loop."""
    assert (run.greeting, run.threshold) == ("good day: # 1", str(64 * 1024**2))
    assert [machine.plan.role for machine in run.machines] == ["scheduler", "worker", "worker"]
    assert run.client.cluster.scheduler_address.startswith("tls://") and run.client.cluster.security.require_encryption
    assert all(worker["nanny"].startswith("tls://") for worker in run.workers)
    assert {worker["name"] for worker in run.workers} == {machine.name for machine in run.machines[1:]}


def test_custom_data_is_small_and_contains_no_secrets(run: Run) -> None:
    """Custom data contains only the Dask settings that the machines need, and none of the client's credentials."""
    for machine in run.machines:
        assert len(machine.custom_data.encode()) < 10_000
        serialized = machine.custom_data.partition('DASK_INTERNAL_INHERIT_CONFIG="')[2].partition('"')[0]
        settings = dask.config.deserialize(serialized)
        assert set(settings) == {"distributed"}
        assert set(settings["distributed"]) == {"admin", "comm", "scheduler", "worker"}
        assert settings["distributed"]["worker"] == {"profile": {"enabled": False}}
        assert settings["distributed"]["comm"]["tls"]["worker"]["key"].startswith("-----BEGIN PRIVATE KEY")
        texts = machine.custom_data + json.dumps(settings)
        assert not [word for word in (SECRET, "loopback", "AZURE_", "ccount") if word in texts]


def test_custom_data_ends_machines(run: Run) -> None:
    """Machines end after max_lifetime, after idle_timeout, and when their container ends."""
    for machine in run.machines:
        runs = yaml.safe_load(machine.custom_data)["runcmd"]
        assert runs[0].startswith("systemd-run --on-active=43200 /bin/sh -c 'python3 /opt/fruitdask/end_machine.py")
        assert "apt-get install -y docker.io" in runs[1] and runs[2] == "echo 'a: b' # c"
        assert runs[-1] == "python3 /opt/fruitdask/end_machine.py && sleep 600; shutdown -h now"
        assert "--gpus" not in machine.custom_data and "bootstrap" not in machine.custom_data
    assert "--idle-timeout 1200s" in run.machines[0].custom_data and "--no-dashboard" in run.machines[0].custom_data
    assert all('"death_timeout": 1200' in machine.custom_data for machine in run.machines[1:])


def test_resources_are_tagged_and_deleted_with_their_machine(run: Run) -> None:
    """Only the scheduler has a public address, because the configuration asks for one."""
    kinds = [name.partition("/")[0] for name in run.resources]
    assert kinds == ["disks"] * 3 + ["networkinterfaces"] * 3 + ["publicipaddresses"] + ["virtualmachines"] * 3
    run_id = run.client.cluster.settings.run_id
    assert run.tags == [{"team": "fruits", "fruitdask-run": run_id}] * 7
    for machine, interface in zip(run.machines, run.interfaces, strict=True):
        properties = machine.body["properties"]
        assert properties["storageProfile"]["osDisk"]["deleteOption"] == "Delete"
        assert properties["networkProfile"]["networkInterfaces"][0]["properties"] == {"deleteOption": "Delete"}
        [configuration] = interface["properties"]["ipConfigurations"]
        public = configuration["properties"].get("publicIPAddress")
        assert (public and public["properties"]) == ({"deleteOption": "Delete"} if machine is run.machines[0] else None)


def test_machines_have_an_identity_and_workers_are_spot(run: Run) -> None:
    """The setting cluster.identity may be the name of an identity in the resource group."""
    for machine in run.machines:
        [identity] = machine.body["identity"]["userAssignedIdentities"]
        assert identity.endswith(
            "resourceGroups/fruits/providers/Microsoft.ManagedIdentity/userAssignedIdentities/fruit-machines"
        )
        assert machine.body["properties"]["securityProfile"] == {"encryptionAtHost": True}
    assert [machine.is_spot for machine in run.machines] == [False, True, True]
    spot = run.machines[1].body["properties"]
    assert spot["evictionPolicy"] == "Delete" and spot["billingProfile"] == {"maxPrice": -1}


def name_action(call: Call) -> str:
    """Name the Azure action that a request needs."""
    kind, _, part = call.kind.partition("/")
    provider = "Compute" if kind in ("virtualMachines", "disks") else "Network"
    verb = {"GET": "read", "PUT": "write", "DELETE": "delete", "POST": "action"}[call.method]
    return "/".join(filter(None, (f"Microsoft.{provider}", kind, part, verb)))


def test_roles_allow_the_requests_to_azure(run: Run) -> None:
    """The role allows every request that the launcher sends, and little else."""
    config = fruitdask.load_config(
        {"input": {"url": "abfs://a/b"}, "output": {"url": "abfs://a/c"}, "cluster": describe(public_ingress=True)}
    )
    role = set(build_roles(config)["launcher"]["Actions"])
    asked = {name_action(call) for call in run.calls}
    assert asked <= role
    unseen = {action.removeprefix("Microsoft.") for action in role - asked}
    # Azure itself checks all but the last one, which is used only if a machine does not start.
    assert unseen == {
        "Compute/disks/write",
        "Network/networkInterfaces/join/action",
        "Network/networkSecurityGroups/join/action",
        "Network/publicIPAddresses/join/action",
        "Network/virtualNetworks/subnets/join/action",
        "ManagedIdentity/userAssignedIdentities/assign/action",
        "Compute/virtualMachines/retrieveBootDiagnosticsData/action",
    }


def test_usage_is_known_after_the_cluster_has_ended(run: Run) -> None:
    """Usage has one entry per machine, and no longer changes once the cluster has ended."""
    after = list_usage(run.client)
    sizes = [("Standard_B2s_v2", False), ("Standard_D2s_v5", True), ("Standard_D2s_v5", True)]
    assert [(one.instance_type, one.is_spot) for one in after] == sizes and after[0].region == "westeurope"
    assert all(0 < early.seconds < late.seconds < 120 for early, late in zip(run.usage, after, strict=True))
    assert list_usage(run.client) == after


def test_list_instances_reports_spot_and_age(run: Run) -> None:
    """The command `fruitdask clusters list` prints both."""
    scheduler, *workers = run.listed
    assert (scheduler.role, scheduler.is_spot) == ("scheduler", False)
    assert [(worker.role, worker.is_spot, worker.region) for worker in workers] == [("worker", True, "westeurope")] * 2
    assert all(0 < worker.age_seconds < scheduler.age_seconds < 120 for worker in workers)
