"""Clusters on the loopback Azure: how they start, fail, scale and end; none of them leaves anything behind."""

import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from azure_clusters import check_nothing_left, configure, describe
from azure_proxy import Refusal
from azurite import CONTAINER, open_account
from click.testing import CliRunner
from cluster_events import (
    PATIENCE_SECONDS,
    assert_says,
    end_while_tasks_run,
    interrupt_self,
    make_slow_square,
    wait_until,
)
from distributed import wait
from loopback_azure import LoopbackAzure
from runs import Finish, configure as configure_run

import fruitdask
from fruitdask.cli import cli
from fruitdask.cluster import list_usage, open_client
from fruitdask.cluster.azure.machines import open_arm, terminate_run
from fruitdask.core.config import ModelConfig
from fruitdask.errors import ClusterStartError, ConfigError

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc"),
]


@pytest.fixture(scope="module")
def storage(request: pytest.FixtureRequest, sample_folder: Path) -> Iterator[dict[str, Any]]:
    """Start an Azure Storage account that holds the drawn images; return its storage options."""
    with open_account(request, sample_folder, "images") as server:
        yield server.options


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackAzure]:
    """Start a loopback Azure, and check at the end that the test left nothing on it."""
    with LoopbackAzure() as cloud:
        cloud.use(monkeypatch)
        yield cloud
        check_nothing_left(cloud)


def on_call(
    cloud: LoopbackAzure, patch: pytest.MonkeyPatch, what: tuple[str, str], n: int, do: Callable[[], Any]
) -> None:
    """Call a function when the n-th request with a method and a kind of resource arrives, before Azure responds."""
    note, seen = cloud.note, []

    def note_and_do(call: Any) -> None:
        note(call)
        if (call.method, call.kind) == what:
            seen.append(call)
            if len(seen) == n:
                do()

    patch.setattr(cloud, "note", note_and_do)


def invoke(*arguments: str, answer: str | None = None) -> tuple[int, str]:
    """Run a command in this process; return its exit code and output."""
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli, arguments, input=answer)
    return result.exit_code, result.output


def test_scheduler_that_never_starts(cloud: LoopbackAzure) -> None:
    """The start has a deadline, and the error says what to check."""
    cloud.faults.never_boots = {"scheduler"}
    message = r"scheduler did not start within cluster.start_timeout \(3 s\)"
    with pytest.raises(ClusterStartError, match=message) as caught:
        with open_client(configure(start_timeout=3)):
            pass
    assert_says(caught, "-scheduler (Standard_B2s_v2, image any, ubuntu", ") is running; ")
    assert_says(caught, "check that this machine is in the virtual network", "security group nsg")
    assert len(cloud.machines) == 1


def test_image_that_cannot_be_pulled(cloud: LoopbackAzure) -> None:
    """The machine deletes itself, so the client notices long before the deadline."""
    cloud.faults.unpullable = {"nobody/nothing:1"}
    with pytest.raises(ClusterStartError, match="ended before it started to listen: .* is deleted.*pull"):
        with open_client(configure(docker_image="nobody/nothing:1")):
            pass


def test_machine_that_may_not_delete_itself_is_deleted_by_its_client(cloud: LoopbackAzure) -> None:
    """Without the right to delete itself, the machine only stops, which still costs money; its console says why."""
    cloud.faults.unpullable, cloud.faults.may_delete = {"nobody/nothing:1"}, False
    with pytest.raises(ClusterStartError, match="is stopped; its console ends: .*cannot pull the image") as caught:
        with open_client(configure(docker_image="nobody/nothing:1")):
            pass
    assert_says(caught, "cannot delete itself: HTTP Error 403")


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        pytest.param(
            Refusal("virtualMachines", "QuotaExceeded", name="scheduler"),
            r"cluster on Azure did not start: .*QuotaExceeded\): the quota of the subscription",
            id="scheduler",
        ),
        pytest.param(
            Refusal("virtualMachines", "SkuNotAvailable", name="worker"), "no worker could be .*capacity", id="capacity"
        ),
        pytest.param(
            Refusal("networkInterfaces", "AuthorizationFailed", status=403), "did not start: .*iam-policy", id="denied"
        ),
    ],
)
def test_refused_launches(cloud: LoopbackAzure, refusal: Refusal, expected: str) -> None:
    """The start fails at once, and the error explains the refusal."""
    cloud.faults.refusals.append(refusal)
    with pytest.raises(ClusterStartError, match=expected):
        with open_client(configure(n_workers=2)):
            pass


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        pytest.param(
            {"location": "eastus"}, {}, "vnet is in westeurope, but cluster.location is eastus", id="location"
        ),
        pytest.param(
            {"subscription_id": "s"}, {}, "no such subscription, or.*cluster.subscription_id", id="subscription"
        ),
        pytest.param({"resource_group": "g"}, {}, "no such resource group; create it", id="group"),
        pytest.param({"vnet": "v"}, {}, "resource group fruits has no virtual network v; create it", id="vnet"),
        pytest.param({"security_group": "n"}, {}, "resource group fruits has no security group n;", id="nsg"),
        pytest.param({"subnet": "s"}, {}, r"has no subnet s \(it has default\)", id="subnet"),
        pytest.param(
            {"env_vars": {f"X{n}": "x" * 900 for n in range(80)}},
            {},
            r"custom data of a machine would have \d+,\d+ bytes, but Azure accepts 65,535 \(cluster.env_vars: 7",
            id="custom data",
        ),
    ],
)
def test_missing_resources_are_named(
    cloud: LoopbackAzure, options: dict[str, Any], environment: dict[str, None], expected: str
) -> None:
    """Nothing is launched, and the error names what is missing in one sentence."""
    with pytest.raises(ClusterStartError, match=expected) as caught:
        with open_client(configure(**options)):
            pass
    assert "\n" not in str(caught.value) and cloud.machines == {}


def test_missing_credentials_and_subscription_are_named(cloud: LoopbackAzure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one sentence."""
    with monkeypatch.context() as patch:
        patch.delenv("AZURE_SUBSCRIPTION_ID")
        with pytest.raises(ConfigError, match="no Azure subscription is set; .*cluster.subscription_id"):
            with open_client(configure()):
                pass
    with monkeypatch.context() as patch:
        patch.delenv("AZURE_CLIENT_SECRET")
        patch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
        with pytest.raises(ClusterStartError, match="found no Azure credentials; log in .*az login"):
            with open_client(configure()):
                pass


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that installs the packages."""
    monkeypatch.setitem(sys.modules, "azure.mgmt.network", None)
    with pytest.raises(ConfigError, match=r"azure.mgmt.network\); run pip install 'fruitdask\[azure\]'"):
        with open_client(configure()):
            pass


@pytest.mark.parametrize("name", ["AZURE_CLIENT_SECRET", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY"])
def test_credentials_in_variables_are_refused(name: str) -> None:
    """Anyone with read access to a machine could read them."""
    with pytest.raises(ConfigError, match=f"{name} looks like a credential.*cluster.identity"):
        with open_client(configure(env_vars={name: "x"})):
            pass


def test_start_needs_only_the_first_worker(cloud: LoopbackAzure) -> None:
    """If Azure refuses a worker, nothing is left of it, its launch is retried, and the run does not wait for it."""
    cloud.faults.refusals.append(Refusal("virtualMachines", "SkuNotAvailable", name="worker", count=1))
    with open_client(configure(n_workers=2, spot=True)) as client:
        assert len(client.scheduler_info()["workers"]) == 1
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        assert len([name for name in cloud.list_resources() if name.startswith("networkinterfaces")]) == 3


@pytest.mark.parametrize("n", [pytest.param(1, id="scheduler"), pytest.param(2, id="worker")])
def test_ctrl_c_while_a_machine_is_being_created(
    cloud: LoopbackAzure, monkeypatch: pytest.MonkeyPatch, ending: threading.Event, n: int
) -> None:
    """The machine is deleted even if the user presses Ctrl-C before Azure responds to the request to create it."""

    def interrupt() -> None:
        interrupt_self()
        assert ending.wait(PATIENCE_SECONDS)
        # Simulates a slow response: a cluster that did not wait for it would find no machine to delete.
        time.sleep(0.5)

    on_call(cloud, monkeypatch, ("PUT", "virtualMachines"), n, interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        with open_client(configure()):
            pass
    assert len(cloud.machines) == n


def test_ctrl_c_while_the_scheduler_starts(cloud: LoopbackAzure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C interrupts the wait, and a second Ctrl-C does not prevent the cleanup."""
    cloud.faults.never_boots = {"scheduler"}
    on_call(cloud, monkeypatch, ("GET", "virtualMachines/instanceView"), 2, interrupt_self)
    on_call(cloud, monkeypatch, ("DELETE", "virtualMachines"), 1, interrupt_self)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        with open_client(configure()):
            pass
    assert len(cloud.machines) == 1


def test_ctrl_c_while_tasks_run(cloud: LoopbackAzure) -> None:
    """The machines are deleted; `test_cluster_ec2.py` tests the other ways to end, which all clouds share."""
    end_while_tasks_run(open_client(configure()), interrupt_self, KeyboardInterrupt)


def test_killed_client(cloud: LoopbackAzure, tmp_path: Path) -> None:
    """Machines delete themselves after their client was killed."""
    script = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from fruitdask.cluster import open_client
from fruitdask.core.config import AzureClusterConfig
if __name__ == "__main__":
    with open_client(AzureClusterConfig(**{describe(idle_timeout=60)!r})) as client:
        futures = client.map(time.sleep, [0.05 + n / 1e6 for n in range(2000)])
        futures[0].result()
        # Shorten the timeout only now: otherwise a cluster that starts slowly would end before it is used.
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "idle_timeout", 0.5))
        print("computing", flush=True)
        client.gather(futures)
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "computing\n"
        assert len(cloud.alive()) == 2
        process.kill()
    assert cloud.wait_until_quiet(PATIENCE_SECONDS)
    deleted = {call.caller for call in cloud.calls if (call.method, call.kind) == ("DELETE", "virtualMachines")}
    assert deleted == set(cloud.machines)


def test_max_lifetime(cloud: LoopbackAzure) -> None:
    """Machines end whatever the client does, and closing a cluster that has ended raises no error."""
    with open_client(configure()) as client:
        first = list(cloud.machines.values())
        cloud.lifetime_is_over.set()
        wait_until(lambda: {machine.power for machine in first} == {"deleted"}, "they have deleted themselves")
        scheduler, worker = (machine.name for machine in first)
        running = client.cluster.list_running
        wait_until(lambda: not {scheduler, worker} & set(running()), "the cluster notices that both have ended")
    deleted = {call.caller for call in cloud.calls if (call.method, call.kind) == ("DELETE", "virtualMachines")}
    assert {scheduler, worker} <= deleted


def test_worker_that_ends_after_the_scheduler_is_noticed(cloud: LoopbackAzure) -> None:
    """Otherwise it would count as connected, and as billed until the end of the run."""
    with open_client(configure()) as client:
        scheduler, worker = cloud.machines.values()
        running = client.cluster.list_running
        cloud.evict(scheduler)
        wait_until(lambda: scheduler.name not in running(), "the cluster notices that the scheduler has ended")
        cloud.evict(worker)
        wait_until(lambda: worker.name not in running(), "the cluster notices that the worker has ended")


def test_machines_that_cannot_be_deleted_are_named(cloud: LoopbackAzure) -> None:
    """The error names the machines that still cost money, and the command that deletes them."""
    refusal = Refusal("virtualMachines", "AuthorizationFailed", status=403, method="DELETE")
    message = r"-scheduler, dask-\w+-worker-\w+ of run \w+ may still run"
    with pytest.raises(ClusterStartError, match=message) as caught:
        with open_client(configure()) as client:
            run_id = client.cluster.settings.run_id
            cloud.faults.refusals.append(refusal)
    assert_says(
        caught, "iam-policy", f"cleanup --cloud azure --subscription {cloud.subscription} --resource-group fruits"
    )
    cloud.faults.refusals.clear()
    with open_arm("fruits", subscription=None, action="clean up") as arm:
        assert len(terminate_run(arm, run_id)) == 2


def test_evicted_worker_is_replaced(cloud: LoopbackAzure) -> None:
    """If a worker is evicted, no result is lost and another worker is launched."""
    with open_client(configure(n_workers=2, spot=True)) as client:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        futures = client.map(make_slow_square(), range(12))
        victim = cloud.alive("worker")[-1]
        wait(futures[:2], timeout=PATIENCE_SECONDS)
        cloud.evict(victim)
        assert client.gather(futures) == [number**2 for number in range(12)]
        wait_until(lambda: len(cloud.alive("worker")) == 2, "another worker is launched")
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
    assert len(list_usage(client)) == 4


def test_stopped_worker_is_replaced_and_deleted(cloud: LoopbackAzure) -> None:
    """A worker that may not delete itself only stops; the client deletes it, because it would still cost money."""
    cloud.faults.may_delete = False
    with open_client(configure()) as client:
        [worker] = cloud.alive("worker")
        os.kill(client.submit(os.getppid).result(PATIENCE_SECONDS), signal.SIGKILL)
        wait_until(lambda: worker.power == "deleted", "the stopped machine is deleted")
        wait_until(lambda: len(cloud.alive("worker")) == 1, "another worker is launched")
        assert client.submit(operator.add, 40, 2).result(PATIENCE_SECONDS) == 42


def test_scaling_down_loses_nothing(cloud: LoopbackAzure) -> None:
    """Data that cannot be recomputed is moved to the remaining worker."""
    with open_client(configure(n_workers=2)) as client:
        client.wait_for_workers(2, timeout=PATIENCE_SECONDS)
        futures = client.scatter(list(range(24)))
        assert len(client.has_what()) == 2 and all(client.has_what().values())
        client.cluster.scale(1)
        wait_until(lambda: len(cloud.list_resources()) == 6, "a worker and its resources are deleted")
        assert client.gather(futures) == list(range(24))


@pytest.fixture
def leftovers(cloud: LoopbackAzure) -> LoopbackAzure:
    """Create a machine of one run, and a disk and a public address that another run left behind."""
    cloud.faults.never_boots = {"other"}
    tags = [{"fruitdask-run": run_id} for run_id in ("0" * 12, "f" * 12)]
    names = [f"dask-{'0' * 12}-worker-1", f"dask-{'f' * 12}-scheduler"]
    nic = cloud.put(
        "Microsoft.Network/networkInterfaces",
        f"{names[0]}-network-interface",
        {
            "tags": tags[0],
            "properties": {"ipConfigurations": [{"properties": {"privateIPAddress": f"{cloud.network}.9"}}]},
        },
    )
    properties = {
        "hardwareProfile": {"vmSize": "Standard_D2s_v5"},
        "osProfile": {},
        "storageProfile": {"osDisk": {"name": f"{names[0]}-disk", "deleteOption": "Delete"}},
        "networkProfile": {"networkInterfaces": [{"id": nic["id"]}]},
    }
    body = {"location": "westeurope", "tags": tags[0], "properties": properties}
    cloud._put(
        f"{cloud.base}/Microsoft.Compute/virtualMachines/{names[0]}",
        "Microsoft.Compute/virtualMachines",
        names[0],
        body,
    )
    cloud.put("Microsoft.Compute/disks", f"{names[1]}-disk", {})
    cloud.put("Microsoft.Network/publicIPAddresses", f"{names[1]}-public-address", {"tags": tags[1]})
    return cloud


def test_clusters_list_and_cleanup(leftovers: LoopbackAzure) -> None:
    """The commands find machines and the remains of deleted ones; cleanup asks before it deletes them."""
    where = ("--cloud", "azure", "--resource-group", "fruits")
    code, printed = invoke("clusters", "list", *where)
    [one, other] = [line for line in printed.splitlines() if re.search("0{12}|f{12}", line)]
    assert code == 0 and "Standard_D2s_v5" in one and "disk, public address" in other and "westeurope" in other
    code, printed = invoke("clusters", "cleanup", *where, answer="n\n")
    assert code == 1 and "Terminate 3" in printed and len(leftovers.list_resources()) == 5
    code, printed = invoke("clusters", "cleanup", *where, "--run", "f" * 12, "--yes")
    assert code == 0 and f"of run {'f' * 12} in westeurope" in printed and len(leftovers.list_resources()) == 3
    code, printed = invoke("clusters", "cleanup", *where, "--yes")
    assert code == 0 and f"Terminated dask-{'0' * 12}-worker-1 of run {'0' * 12} in westeurope." in printed
    assert invoke("clusters", "list", *where) == (0, "No machine of fruitdask in the resource group fruits.\n")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        pytest.param(("--cloud", "azure"), 2, "--cloud azure needs --resource-group NAME", id="group"),
        pytest.param(("--cloud", "azure", "--resource-group", "g"), 5, "no such resource group", id="no group"),
        pytest.param(
            ("--cloud", "azure", "--resource-group", "g", "--region", "x"), 2, "only for --cloud ec2", id="region"
        ),
        pytest.param(("--resource-group", "g"), 2, "only for --cloud azure", id="ec2"),
    ],
)
def test_clusters_explains_mistakes(cloud: LoopbackAzure, arguments: tuple[str, ...], code: int, expected: str) -> None:
    """The error is one sentence."""
    found, printed = invoke("clusters", "list", *arguments)
    assert (found, printed.count("\n")) == (code, 1) and expected in printed


def test_run_on_azure_computes_the_same_features_as_a_local_run(
    storage: dict[str, Any],
    cloud: LoopbackAzure,
    sample_folder: Path,
    tiny_model: ModelConfig,
    finish: Finish,
    tmp_path: Path,
) -> None:
    """Its images, machines and results are all on Azure."""
    images, results = (f"abfs://{CONTAINER}/{name}" for name in ("images", "results"))
    tree = configure_run(images, results, tiny_model, cluster=describe(n_workers=2)).model_dump()
    for section in ("input", "output"):
        tree[section]["storage_options"] = storage
    result = fruitdask.run(fruitdask.load_config(tree))
    local = finish(configure_run(sample_folder, tmp_path / "results", tiny_model))
    np.testing.assert_allclose(result.features.compute(), local.features.compute(), rtol=1e-6, atol=1e-6)
    assert list(result.table["path"]) == list(local.table["path"])
    assert [machine.plan.role for machine in cloud.machines.values()] == ["scheduler", "worker", "worker"]
