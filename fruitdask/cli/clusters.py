"""Commands that find and terminate machines on EC2 and Azure."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from fruitdask.cli.common import reported
from fruitdask.errors import ClusterStartError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fruitdask.cluster.cloud.instances import Instance

_N_REGIONS_AT_ONCE = 8

_OPTIONS = (
    click.option("--cloud", type=click.Choice(["ec2", "azure"]), default="ec2", show_default=True, help="Which cloud."),
    click.option(
        "--region",
        "regions",
        multiple=True,
        help="AWS region; by default that of the profile or the environment. Repeatable.",
    ),
    click.option("--all-regions", is_flag=True, help="All AWS regions that the account can use."),
    click.option("--resource-group", metavar="NAME", help="Resource group on Azure."),
    click.option("--subscription", metavar="ID", help="Subscription on Azure; by default AZURE_SUBSCRIPTION_ID."),
)


@dataclass(frozen=True)
class _Place:
    """A place to search for machines: its name, how to list and terminate machines there, and how to clean up."""

    name: str
    noun: str
    list_instances: "Callable[[str | None], list[Instance]]"
    terminate_run: Callable[[str, str], list[str]]
    close: Callable[[], None]


def _search_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where to search."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.group()
def clusters() -> None:
    """Find and terminate machines that fruitdask has started."""


@clusters.command("list")
@_search_options
def list_(**search: Any) -> None:
    """List runs that have machines, with age and cost.

    Instances that have ended are not counted. Prices come from fruitdask's table, which has none for Azure; spot
    instances cost less.
    """
    with reported(), _open_place(**search) as place:
        _find(place)


@clusters.command()
@_search_options
@click.option("--run", "run_id", metavar="ID", help="Only the machines of this run.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cleanup(run_id: str | None, yes: bool, **search: Any) -> None:
    """Terminate machines that fruitdask has started.

    Stored results are kept. A run whose machines are terminated ends with an error, and can be run again. On Azure,
    their disks, network interfaces and addresses are deleted too.
    """
    with reported(), _open_place(**search) as place:
        found = _find(place, run_id)
        if found and not yes:
            click.confirm(f"Terminate {len(found)} {place.noun}{'s' * (len(found) != 1)}?", abort=True)
        for region, run in dict.fromkeys((one.region, one.run_id) for one in found):
            ended = place.terminate_run(region, run)
            click.echo(f"Terminated {', '.join(ended) or 'nothing (all had ended)'} of run {run} in {region}.")
        place.close()


@contextmanager
def _open_place(
    cloud: str, regions: Sequence[str], all_regions: bool, resource_group: str | None, subscription: str | None
) -> Iterator[_Place]:
    """Open the place that the options name."""
    if cloud == "ec2":
        if resource_group or subscription:
            raise ConfigError("--resource-group and --subscription are only for --cloud azure; add it, or remove them")
        yield _find_place_on_ec2(regions, all_regions=all_regions)
        return
    if regions or all_regions:
        raise ConfigError("--region and --all-regions are only for --cloud ec2; give only --resource-group")
    if not resource_group:
        raise ConfigError("--cloud azure needs --resource-group NAME, that of cluster.resource_group")
    from fruitdask.cluster.azure.machines import list_instances, open_arm, terminate_run

    action = "list or delete the machines of fruitdask"
    with open_arm(resource_group, subscription=subscription, action=action) as arm:
        yield _Place(
            name=f"the resource group {resource_group}",
            noun="machine",
            list_instances=lambda run_id: list_instances(arm, run_id=run_id),
            terminate_run=lambda _, run_id: terminate_run(arm, run_id),
            close=lambda: None,
        )


def _find_place_on_ec2(regions: Sequence[str], *, all_regions: bool) -> _Place:
    """Find the regions to search."""
    from concurrent.futures import ThreadPoolExecutor

    from fruitdask.cluster.ec2.instances import list_instances, terminate_run

    searched = _choose_regions(regions, all_regions=all_regions)

    def list_all(run_id: str | None) -> "list[Instance]":
        with ThreadPoolExecutor(_N_REGIONS_AT_ONCE) as pool:
            listed = list(pool.map(lambda region: list_instances(region, run_id=run_id), searched))
        return [one for instances in listed for one in instances]

    def close() -> None:
        for region in searched:
            _close_group(region)

    return _Place(", ".join(searched), "instance", list_all, terminate_run, close)


def _find(place: _Place, run_id: str | None = None) -> "list[Instance]":
    """Find and print the machines that have not ended."""
    from rich.console import Console

    found = [one for one in place.list_instances(run_id) if not one.is_ending]
    if found:
        Console().print(_build_table(found, place.noun))
    else:
        owner = f"run {run_id}" if run_id else "fruitdask"
        click.echo(f"No {place.noun} of {owner} in {place.name}.")
    return found


def _close_group(region: str) -> None:
    """Revoke the rules that runs have added to the security group, if no instance is left."""
    from fruitdask.cluster.ec2.instances import list_instances
    from fruitdask.cluster.ec2.network import withdraw_rules

    if not all(one.is_ending for one in list_instances(region)):
        return
    try:
        n_ranges = withdraw_rules(region)
    except ClusterStartError as error:
        # No instance runs and costs money, so this is not a failure.
        click.echo(f"fruitdask: {error}", err=True)
        return
    if n_ranges:
        click.echo(f"Closed the security group in {region}, which still admitted {n_ranges} range(s) of addresses.")


def _choose_regions(regions: Sequence[str], *, all_regions: bool) -> list[str]:
    """Choose the regions to search."""
    from botocore.exceptions import InvalidRegionError, NoRegionError
    from botocore.utils import validate_region_name

    from fruitdask.cluster.ec2.instances import list_regions, open_ec2

    if all_regions:
        return list_regions()
    try:
        for region in regions:
            validate_region_name(region)
        if regions:
            return list(dict.fromkeys(regions))
        with open_ec2(None, action="find the default region") as client:
            return [client.meta.region_name]
    except InvalidRegionError as error:
        raise ConfigError(f"--region {region}: expected the name of a region such as eu-west-3") from error
    except ClusterStartError as error:
        if not isinstance(error.__cause__, NoRegionError):
            raise
        remedy = "give --region NAME or --all-regions, or set AWS_DEFAULT_REGION"
        raise ConfigError(f"no AWS region is set; {remedy}") from error


def _build_table(found: Iterable["Instance"], noun: str) -> "Table":
    """Build the table of runs."""
    from rich.table import Table

    from fruitdask.report.formats import format_seconds

    runs: dict[tuple[str, str], list[Instance]] = {}
    for one in found:
        runs.setdefault((one.region, one.run_id), []).append(one)
    table = Table("run", "region", f"{noun}s", "types", "age", "cost so far")
    table.columns[0].no_wrap = True
    for (region, run_id), instances in runs.items():
        types = ", ".join(sorted({f"{one.instance_type}{' (spot)' * one.is_spot}" for one in instances}))
        age = format_seconds(max(one.age_seconds for one in instances))
        table.add_row(run_id, region, str(len(instances)), types, age, _format_cost(instances))
    return table


def _format_cost(instances: Iterable["Instance"]) -> str:
    """Format the cost of instances so far; a dash if a price is unknown."""
    from fruitdask.cluster.cloud.prices import Usage, compute_cost

    cost = compute_cost(Usage(one.instance_type, one.is_spot, one.region, one.age_seconds) for one in instances)
    return "-" if cost.unpriced else f"${cost.dollars:.2f}"
