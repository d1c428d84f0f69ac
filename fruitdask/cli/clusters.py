"""Commands that find and terminate instances on EC2."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from fruitdask.cli.common import reported
from fruitdask.errors import ClusterStartError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fruitdask.cluster.cloud.instances import Instance

_N_REGIONS_AT_ONCE = 8

_region_option = click.option(
    "--region",
    "regions",
    multiple=True,
    help="AWS region; by default that of the profile or the environment. Repeatable.",
)
_all_option = click.option("--all-regions", is_flag=True, help="All regions that the account can use.")


@click.group()
def clusters() -> None:
    """Find and terminate instances that fruitdask has started."""


@clusters.command("list")
@_region_option
@_all_option
def list_(regions: tuple[str, ...], all_regions: bool) -> None:
    """List runs that have instances, with their age and their cost so far.

    Instances that have ended are not counted. Prices are those of fruitdask's table; spot instances cost less.
    """
    with reported():
        _find(regions, all_regions=all_regions)


@clusters.command()
@_region_option
@_all_option
@click.option("--run", "run_id", metavar="ID", help="Only the instances of this run.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cleanup(regions: tuple[str, ...], all_regions: bool, run_id: str | None, yes: bool) -> None:
    """Terminate instances that fruitdask has started.

    Stored results are kept. A run whose instances are terminated ends with an error, and can be run again.
    """
    with reported():
        from fruitdask.cluster.ec2.instances import terminate_run

        found, searched = _find(regions, all_regions=all_regions, run_id=run_id)
        if found and not yes:
            click.confirm(f"Terminate {len(found)} instance{'s' * (len(found) != 1)}?", abort=True)
        for region, run in dict.fromkeys((one.region, one.run_id) for one in found):
            ended = terminate_run(region, run)
            click.echo(f"Terminated {', '.join(ended) or 'nothing (all had ended)'} of run {run} in {region}.")
        for region in searched:
            _close_group(region)


def _find(
    regions: Sequence[str], *, all_regions: bool, run_id: str | None = None
) -> tuple[list["Instance"], list[str]]:
    """Find and print the instances that have not ended; return them and the searched regions."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console

    from fruitdask.cluster.ec2.instances import list_instances

    searched = _choose_regions(regions, all_regions=all_regions)
    with ThreadPoolExecutor(_N_REGIONS_AT_ONCE) as pool:
        listed = list(pool.map(lambda region: list_instances(region, run_id=run_id), searched))
    found = [one for instances in listed for one in instances if not one.is_ending]
    if found:
        Console().print(_build_table(found))
    else:
        owner = f"run {run_id}" if run_id else "fruitdask"
        click.echo(f"No instance of {owner} in {', '.join(searched)}.")
    return found, searched


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


def _build_table(found: Iterable["Instance"]) -> "Table":
    """Build the table of runs."""
    from rich.table import Table

    from fruitdask.report.formats import format_seconds

    runs: dict[tuple[str, str], list[Instance]] = {}
    for one in found:
        runs.setdefault((one.region, one.run_id), []).append(one)
    table = Table("run", "region", "instances", "types", "age", "cost so far")
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
