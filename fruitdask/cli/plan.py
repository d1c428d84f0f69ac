"""The command that estimates the time and cost of a run."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from fruitdask.cli.common import (
    load,
    model_option,
    override_model,
    photographs_argument,
    print_rows,
    reported,
    set_option,
    verbose_option,
    weights_option,
)
from fruitdask.errors import LimitError

if TYPE_CHECKING:
    from fruitdask.core.config import Config
    from fruitdask.pipeline.plan import Plan

#: US dollars below which a cost is not shown.
_CENT = 0.005


@click.command()
@photographs_argument
@model_option
@weights_option
@click.option("--json", "is_json", is_flag=True, help="Print the plan as JSON.")
@set_option
@verbose_option
def plan(
    config: str,
    model: str | None,
    weights: str | None,
    is_json: bool,
    overrides: tuple[str, ...],
    verbose: bool,
) -> None:
    """Estimate time, memory, machines and cost of a run.

    Starts no cluster, but tries a few dozen images on this machine. The exit code is 4 if a policy or a limit would
    refuse the run.
    """
    from fruitdask.core.progress import choose_progress

    with reported(verbose=verbose):
        loaded = load(config, override_model(model, weights) + overrides)
        from fruitdask.pipeline.run import plan as plan_run

        found = plan_run(loaded, progress=choose_progress())
        if is_json:
            click.echo(json.dumps(found.describe(), indent=2))
        else:
            print_rows(_describe(found, loaded, config))
        if found.exceeded:
            raise LimitError(f"the run would not be started: {'; '.join(found.exceeded)}")


def _describe(plan: "Plan", config: "Config", path: str) -> dict[str, str]:
    """Describe a plan in rows."""
    from fruitdask.report.formats import format_bytes, format_seconds

    work = f"{plan.n_images:,} in {plan.n_classes:,} classes, {format_bytes(plan.n_bytes)}"
    done = plan.n_images - plan.n_left
    tried, memory = "", ""
    if plan.sample is not None:
        times = plan.sample.image_seconds.items()
        stages = ", ".join(f"{stage} {1000 * value:.1f} ms" for stage, value in times if value)
        failed = f"; {plan.sample.n_failed:,} failed" if plan.sample.n_failed else ""
        tried = f"{plan.sample.n_images:,} images here: {stages} per image, on one thread{failed}"
        memory = f"{format_bytes(plan.worker_bytes)} per worker"
    seconds = ", ".join(f"{stage} {format_seconds(value)}" for stage, value in plan.seconds.items())
    regions = ", ".join(f"{place} {region}" for place, region in plan.regions.items())
    return {
        "images": f"{work}; {done:,} are done" if done else work,
        "partitions": f"{plan.n_partitions:,} of {plan.images_per_partition:,} images",
        "features": f"{plan.n_features:,} per image, at most {format_bytes(plan.features_bytes)}",
        "tried": tried,
        "workers": f"{plan.n_workers:,} of {plan.threads_per_worker:,} threads",
        "memory": memory,
        "time": f"about {format_seconds(plan.total_seconds)}: {seconds}",
        "instances": "\n".join(_list_machines(plan)),
        "regions": f"{regions}; {_describe_allowed(config)}",
        "bytes moved": "\n".join(
            f"{movement.what}: {format_bytes(movement.n_bytes)} from {movement.source} to {movement.target}"
            + (f", ${movement.dollars:.2f}" if movement.dollars >= _CENT else "")
            for movement in plan.movements
            if movement.n_bytes and movement.source != movement.target
        ),
        "cost": _format_costs(plan),
        "limits": _describe_limits(plan, config),
        "AWS permissions": f"{len(plan.actions)} actions; see fruitdask iam-policy {path}" if plan.actions else "",
        "assumed": "\n".join(plan.assumptions),
        "warnings": "\n".join(plan.warnings),
    }


def _list_machines(plan: "Plan") -> Iterator[str]:
    """List the instances that a run would start."""
    from fruitdask.report.formats import format_bytes, format_seconds

    for machine in plan.machines:
        memory = "" if machine.memory_bytes is None else f" with {format_bytes(machine.memory_bytes)}"
        price = "price unknown" if machine.hourly_dollars is None else f"${machine.hourly_dollars:g} per hour"
        kind = f"{'spot ' * machine.is_spot}{machine.instance_type}{memory}"
        roles = f"{machine.role}{'s' * (machine.n_instances > 1)}"
        yield f"{machine.n_instances:,} {roles}: {kind}, {price}, for {format_seconds(machine.seconds)}"


def _describe_allowed(config: "Config") -> str:
    """Describe the allowed regions; a region that is not allowed has ended the plan."""
    allowed = config.privacy.allowed_regions
    if allowed is None:
        return "privacy.allowed_regions allows all"
    return f"all allowed ({allowed if isinstance(allowed, str) else ', '.join(allowed)})"


def _describe_limits(plan: "Plan", config: "Config") -> str:
    """Describe the limits, and whether the run exceeds them."""
    limits = config.limits.model_dump(exclude_none=True)
    named = ", ".join(f"{name} {value:g}" for name, value in limits.items())
    return f"{named}: {'; '.join(plan.exceeded) or 'the run stays within them'}" if limits else ""


def _format_costs(plan: "Plan") -> str:
    """Format the cost and its parts."""
    if not plan.dollars:
        return "nothing to AWS"
    parts = ", ".join(f"{name} ${dollars:.2f}" for name, dollars in plan.costs.items() if dollars >= _CENT)
    total = f"about ${plan.dollars:.2f}: {parts}" if parts else "less than a cent"
    return f"{total}; a further million images ${plan.dollars_per_million:.2f}" if plan.n_left else total
