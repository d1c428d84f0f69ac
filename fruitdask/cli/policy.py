"""The command that prints IAM policies, or roles of Azure."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from fruitdask.cli.common import config_argument, load_results, reported, set_option

if TYPE_CHECKING:
    from fruitdask.cluster.ec2.policies import Permission, Role
    from fruitdask.core.config import AzureClusterConfig, Config


@click.command("iam-policy")
@config_argument
@click.option(
    "--role",
    type=click.Choice(["launcher", "workers", "both"]),
    default="both",
    show_default=True,
    help="Whose policy: of the machine that runs fruitdask, or of the workers' instance profile.",
)
@click.option("--role-name", help="Name of the workers' role; by default that of their instance profile.")
@click.option("--explain", is_flag=True, help="Explain why each action is needed, instead of printing JSON.")
@set_option
def iam_policy(
    config: str, role: 'Role | Literal["both"]', role_name: str | None, explain: bool, overrides: tuple[str, ...]
) -> None:
    """Print the minimal permissions that a run needs on AWS or Azure.

    On AWS they are IAM policies. --role prints only one of them, for the aws command:

    \b
    fruitdask iam-policy CONFIG --role workers > policy.json
    aws iam put-role-policy --role-name ROLE --policy-name fruitdask \\
        --policy-document file://policy.json

    For a cluster on Azure they are definitions of custom roles, with the az
    commands that create and assign them.
    """
    from fruitdask.cluster.ec2.policies import ROLES, build_policies, list_actions

    with reported():
        loaded = load_results(config, overrides)
        roles: tuple[Role, ...] = ROLES if role == "both" else (role,)
        if loaded.cluster.kind == "azure":
            return _print_azure_roles(loaded, loaded.cluster, roles, explain=explain)
        policies = build_policies(loaded, role_name=role_name)
        if explain:
            for line in _explain(policies, list_actions(loaded, role_name=role_name), roles):
                click.echo(line)
        else:
            click.echo(json.dumps(policies if role == "both" else policies[role], indent=2))
        if not any(policies[one]["Statement"] for one in roles):
            click.echo(f"fruitdask: {config} needs no permission on AWS here", err=True)
        for note in _list_notes(loaded, role_name):
            click.echo(f"fruitdask: {note}", err=True)


def _print_azure_roles(
    config: "Config", cluster: "AzureClusterConfig", roles: "tuple[Role, ...]", *, explain: bool
) -> None:
    """Print the roles of Azure, and how to assign them."""
    from fruitdask.cluster.azure.roles import build_roles, list_commands, list_permissions

    if explain:
        for permission in list_permissions(config):
            if permission.role in roles:
                click.echo(f"{permission.role}: {permission.action:<65} {permission.reason}")
        return
    found = build_roles(config)
    click.echo(json.dumps({role: found[role] for role in roles} if len(roles) > 1 else found[roles[0]], indent=2))
    click.echo("fruitdask: save each role in a file of its name (--role), then:", err=True)
    for command in list_commands(cluster, config):
        click.echo(command, err=True)


def _explain(
    policies: "dict[Role, dict[str, Any]]", permissions: "list[Permission]", roles: "tuple[Role, ...]"
) -> Iterator[str]:
    """Explain each action, by role and statement."""
    reasons = {(need.role, need.statement, need.action): need.reason for need in permissions}
    for role, statement in ((role, statement) for role in roles for statement in policies[role]["Statement"]):
        is_denied = statement["Effect"] == "Deny"
        yield f"{role}: {statement['Sid']}{' (denied, whatever other policies allow)' if is_denied else ''}"
        yield from (f"  on {resource}" for resource in statement["Resource"])
        for operator, keys in statement.get("Condition", {}).items():
            for key, value in keys.items():
                yield f"  if {key} {operator} {value if isinstance(value, str) else ', '.join(value)}"
        for action in statement["Action"]:
            yield f"    {action:<35} {reasons.get((role, statement['Sid'], action), 'privacy.allowed_regions')}"


def _list_notes(config: "Config", role_name: str | None) -> Iterator[str]:
    """List problems that the policies cannot solve."""
    if config.cluster.kind != "ec2":
        return
    if not config.cluster.iam_instance_profile:
        yield "without cluster.iam_instance_profile, workers have no credentials, whatever their policy; set it"
    elif role_name is None:
        yield "the workers' role is assumed to have the name of their instance profile; if not, give --role-name"
