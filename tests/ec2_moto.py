"""What the loopback EC2 adds to the state of moto, removes from it, and refuses although moto accepts it."""

import base64
import os
import uuid
from datetime import UTC, datetime
from typing import Any
from unittest import mock

from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.ec2.models.amis import Ami
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES
from moto.iam.models import iam_backends
from moto.s3.models import s3_backends

MAX_USER_DATA_BYTES = 16_384
CANONICAL = "099720109477"


def reset_moto() -> None:
    """Reset moto's EC2 and IAM, and nothing else."""
    # Skip moto's own list of 1,300 images, which takes a third of a second to build.
    with mock.patch.dict(os.environ, {"MOTO_EC2_LOAD_DEFAULT_AMIS": "false"}):
        for backends in (ec2_backends, iam_backends):
            for of_account in list(backends.values()):
                of_account.reset()


def remove_bucket(name: str) -> None:
    """Remove a bucket from moto, with its content."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    bucket = backend.buckets.pop(name, None)
    s3_backends.bucket_accounts.pop(name, None)
    if bucket is None:
        return
    for _, versions in bucket.keys.lists():
        for version in versions:
            if hasattr(version, "dispose"):
                version.dispose()
    for upload in bucket.multiparts.values():
        upload.dispose()


def add_image(backend: Any, architecture: str) -> str:
    """Add a machine image with a name such as Canonical's."""
    image = Ami(
        backend,
        f"ami-0{uuid.uuid4().hex[:16]}",
        name=f"ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-{architecture}-server-20261101",
        owner_id=CANONICAL,
        public=True,
        virtualization_type="hvm",
        architecture={"amd64": "x86_64"}.get(architecture, architecture),
        creation_date=datetime(2026, 11, 1, tzinfo=UTC).replace(tzinfo=None),
        root_device_type="ebs",
        hypervisor="xen",
    )
    backend.amis[image.id] = image
    return image.id


def check_launch(backend: Any, image_id: str, user_data: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what EC2 refuses but moto accepts."""
    if user_data is not None and len(base64.b64decode(str(user_data))) > MAX_USER_DATA_BYTES:
        raise EC2ClientError("InvalidParameterValue", f"User data is limited to {MAX_USER_DATA_BYTES} bytes")
    if image_id not in backend.amis:
        raise EC2ClientError("InvalidAMIID.NotFound", f"The image id '[{image_id}]' does not exist")
    kind = kwargs["instance_type"]
    if kind not in INSTANCE_TYPES:
        raise EC2ClientError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
    if backend.amis[image_id].architecture not in INSTANCE_TYPES[kind]["ProcessorInfo"]["SupportedArchitectures"]:
        message = f"The architecture of instance type '{kind}' does not match that of the specified AMI."
        raise EC2ClientError("InvalidParameterValue", message)
    for nic in kwargs.get("nics") or []:
        _check_interface(backend, nic, kind)


def _check_interface(backend: Any, nic: dict[str, Any], kind: str) -> None:
    """Refuse unknown security groups, and instance types that the zone of the subnet does not offer."""
    for group in nic.get("Groups") or []:
        if backend.get_security_group_from_id(group) is None:
            raise EC2ClientError("InvalidGroup.NotFound", f"The security group '{group}' does not exist")
    if "SubnetId" not in nic:
        return
    zone = backend.get_subnet(nic["SubnetId"]).availability_zone
    offered = INSTANCE_TYPE_OFFERINGS["availability-zone"][backend.region_name]
    if not any(offer["InstanceType"] == kind and offer["Location"] == zone for offer in offered):
        message = f"Instance type ({kind}) is not supported in your requested Availability Zone ({zone})."
        raise EC2ClientError("Unsupported", message)
