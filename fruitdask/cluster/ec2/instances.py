"""Instances of runs on Amazon EC2, found by their tag: even if the process that started them has died."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from typing import Any

from fruitdask.cluster.cloud.instances import Instance, find_role
from fruitdask.core.aws import RUN_TAG, create_client, explain_aws_error, find_default_region
from fruitdask.errors import ClusterStartError

_TERMINATE_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 1.0
#: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_TerminateInstances.html
_MAX_IDS_PER_CALL = 1000


@contextmanager
def open_ec2(region: str | None, *, action: str) -> Iterator[Any]:
    """Open a client of EC2, and explain its errors."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        with closing(create_client("ec2", region=region)) as client:
            yield client
    except (BotoCoreError, ClientError) as error:
        raise ClusterStartError(f"cannot {action}: {explain_aws_error(error) or error}") from error


def list_instances(region: str | None, *, run_id: str | None = None) -> list[Instance]:
    """List the instances of fruitdask that are not terminated."""
    with open_ec2(region, action="list the instances of fruitdask") as client:
        return _list(client, run_id)


def list_regions() -> list[str]:
    """List the regions that the account can use."""
    with open_ec2(find_default_region() or "us-east-1", action="list the regions of AWS") as client:
        return sorted(region["RegionName"] for region in client.describe_regions()["Regions"])


def terminate_run(region: str | None, run_id: str) -> list[str]:
    """Terminate all instances of a run, and list them again until none is left."""
    terminated: dict[str, None] = {}
    deadline = time.monotonic() + _TERMINATE_TIMEOUT_SECONDS
    with open_ec2(region, action=f"terminate the instances of run {run_id}, which may still be running") as client:
        for n_queries in count(1):
            left = _terminate_alive(client, run_id)
            terminated.update(dict.fromkeys(left))
            # One empty answer proves nothing: EC2 lists an instance only some time after its launch.
            if not left and n_queries > 1:
                break
            if time.monotonic() > deadline:
                raise ClusterStartError(
                    f"run {run_id}: {', '.join(left)} did not end within {_TERMINATE_TIMEOUT_SECONDS:g} s; check "
                    "whether they still run: fruitdask clusters list"
                )
            time.sleep(_POLL_SECONDS)
    return list(terminated)


def _list(client: Any, run_id: str | None) -> list[Instance]:
    """List the instances of a run, or of all runs."""
    tag = {"Name": "tag-key", "Values": [RUN_TAG]} if run_id is None else {"Name": f"tag:{RUN_TAG}", "Values": [run_id]}
    pages = client.get_paginator("describe_instances").paginate(Filters=[tag])
    found = [
        _describe(entry, client.meta.region_name)
        for page in pages
        for reservation in page["Reservations"]
        for entry in reservation["Instances"]
    ]
    return sorted((one for one in found if one.state != "terminated"), key=lambda one: (one.launched_at, one.id))


def _describe(entry: dict[str, Any], region: str) -> Instance:
    """Convert EC2's description of an instance."""
    tags = {tag["Key"]: tag["Value"] for tag in entry.get("Tags", ())}
    return Instance(
        id=entry["InstanceId"],
        run_id=tags[RUN_TAG],
        role=find_role(tags.get("Name", "")),
        instance_type=entry["InstanceType"],
        is_spot=entry.get("InstanceLifecycle") == "spot",
        region=region,
        state=entry["State"]["Name"],
        launched_at=entry["LaunchTime"],
        tags=tags,
    )


def _terminate_alive(client: Any, run_id: str) -> list[str]:
    """Terminate the instances of a run that are not ending, and return their ids."""
    from botocore.exceptions import ClientError

    alive = [one.id for one in _list(client, run_id) if not one.is_ending]
    for start in range(0, len(alive), _MAX_IDS_PER_CALL):
        try:
            client.terminate_instances(InstanceIds=alive[start : start + _MAX_IDS_PER_CALL])
        except ClientError as error:
            # EC2 is eventually consistent and may not yet know an instance that it has just listed: try again.
            if error.response["Error"]["Code"] != "InvalidInstanceID.NotFound":
                raise
    return alive
