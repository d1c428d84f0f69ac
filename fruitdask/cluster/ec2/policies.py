"""Policies of AWS for a configuration: what the launcher and the workers may do, on what, on which conditions, and why.

The tables below are the one source of the policies, of their explanation and of the plan of a run.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

from fruitdask.core.aws import AWS_EU_REGIONS, RUN_TAG, find_default_region
from fruitdask.core.config import Config, EC2ClusterConfig
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError

Role = Literal["launcher", "workers"]
Conditions = Mapping[str, Mapping[str, str | list[str]]]

#: The launcher runs fruitdask; the workers compute, with the role of their instance profile.
ROLES: tuple[Role, ...] = ("launcher", "workers")

#: Partitions of AWS by how the names of their regions begin; all others are in ``aws``.
_PARTITIONS = {"cn-": "aws-cn", "us-gov-": "aws-us-gov", "eusc-": "aws-eusc"}
_S3 = ("s3://", "s3a://")
_NOT_FORBIDDEN = "of a missing object S3 says that it is missing, and not that it is forbidden"


class _Need(NamedTuple):
    """An action on a place in S3: in which statement, and why the launcher and why workers need it; who has no reason does not."""

    statement: Literal["List", "Ask", "Read", "Write"]
    action: str
    reasons: tuple[str, str]


_LIST_ONE = _Need("List", "s3:ListBucket", (_NOT_FORBIDDEN, ""))
_CLEAN_UP = "cleans up when a large upload fails"
#: What places need; ``Ask`` are questions about a bucket, ``Read`` and ``Write`` concern objects.
_NEEDS: Mapping[str, tuple[_Need, ...]] = {
    "Input": (
        _Need("List", "s3:ListBucket", ("lists the images, and finds the bucket's region", _NOT_FORBIDDEN)),
        _Need("Read", "s3:GetObject", ("looks for the folder; tries some images (fruitdask plan)", "reads the images")),
    ),
    "Manifest": (_LIST_ONE, _Need("Read", "s3:GetObject", ("reads the list of the images", ""))),
    "Weights": (_LIST_ONE, _Need("Read", "s3:GetObject", ("reads the weights, from which it builds the network", ""))),
    "Output": (
        _Need("List", "s3:ListBucket", ("finds what is done already, and the bucket's region", _NOT_FORBIDDEN)),
        _Need("Ask", "s3:GetBucketVersioning", ("says whether erased results live on as older versions", "")),
        _Need(
            "Write", "s3:GetObject", ("reads results, to go on, to reduce and to draw", "reads what arrays are like")
        ),
        _Need(
            "Write",
            "s3:PutObject",
            ("writes the manifest, tables, figures and the page", "writes features and outcomes"),
        ),
        _Need(
            "Write", "s3:DeleteObject", ("deletes results that are replaced or erased", "deletes chunks that are empty")
        ),
        _Need("Write", "s3:AbortMultipartUpload", (_CLEAN_UP, _CLEAN_UP)),
    ),
}
_KEY_NEEDS = (
    ("kms:GenerateDataKey", "encrypts what is written to the output"),
    ("kms:Decrypt", "reads it again, and finishes large uploads"),
)
#: Questions to EC2, which have no resource of their own.
_LOOKS = (
    ("ec2:DescribeInstances", "sees whether instances have started, were interrupted, or were left behind"),
    ("ec2:DescribeImages", "finds the machine image"),
    ("ec2:DescribeInstanceTypes", "finds the processors, memory and GPUs of instance types"),
    ("ec2:DescribeInstanceTypeOfferings", "finds zones that offer the instance types"),
    ("ec2:DescribeSubnets", "finds the subnet"),
)
#: Tag of the security group that is made where none is given.
_GROUP_TAG = ("fruitdask", "cluster")


@dataclass(frozen=True)
class Permission:
    """An action that somebody needs."""

    role: Role
    #: Name of the policy's statement, which all permissions of the same resources and conditions share.
    statement: str
    action: str
    #: ARNs of what it is done to; ``*`` where AWS knows no resource for it.
    resources: tuple[str, ...]
    reason: str
    conditions: Conditions = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """A folder or file in S3: which of a configuration's, its bucket and objects by ARN, and its name in the bucket."""

    kind: str
    bucket: str
    prefix: str
    objects: tuple[str, ...]


def list_actions(config: Config, *, role_name: str | None = None) -> list[Permission]:
    """List what a configuration needs of AWS."""
    permissions = [
        permission for role in ROLES for permission in (*_list_storage(config, role), *_list_key(config, role))
    ]
    if isinstance(config.cluster, EC2ClusterConfig):
        region = _find_region(config)
        if region is None:
            raise ConfigError("no AWS region is set for the cluster; give cluster.region, or set AWS_DEFAULT_REGION")
        permissions += _Cloud(config.cluster, region).list_permissions(role_name)
    return sorted(permissions, key=lambda permission: ROLES.index(permission.role))


def build_policies(config: Config, *, role_name: str | None = None) -> dict[Role, dict[str, Any]]:
    """Build the policies of the launcher and of the workers.

    >>> from fruitdask.core.config import load_config
    >>> config = load_config({"input": {"url": "s3://fruits/Test"}, "output": {"url": "/tmp/run"}})
    >>> build_policies(config)["workers"]["Statement"][1]["Resource"]
    ['arn:aws:s3:::fruits/Test', 'arn:aws:s3:::fruits/Test/*']
    """
    permissions = list_actions(config, role_name=role_name)
    policies: dict[Role, dict[str, Any]] = {}
    for role in ROLES:
        own = [permission for permission in permissions if permission.role == role]
        groups = groupby(own, key=lambda permission: permission.statement)
        statements = [_build_statement(list(group)) for _, group in groups]
        policies[role] = {"Version": "2012-10-17", "Statement": statements + _forbid_regions(config, own)}
    return policies


def _build_statement(permissions: list[Permission]) -> dict[str, Any]:
    """Build the statement of permissions that share it."""
    first = permissions[0]
    statement: dict[str, Any] = {
        "Sid": first.statement,
        "Effect": "Allow",
        "Action": [permission.action for permission in permissions],
        "Resource": list(first.resources),
    }
    return statement | ({"Condition": first.conditions} if first.conditions else {})


def _forbid_regions(config: Config, permissions: list[Permission]) -> list[dict[str, Any]]:
    """Forbid all but the allowed regions, whatever other policies say; IAM itself has no region."""
    services = sorted({permission.action.split(":")[0] for permission in permissions} - {"iam"})
    allowed = config.privacy.allowed_regions
    if allowed is None or not services:
        return []
    names = (allowed,) if isinstance(allowed, str) else allowed
    regions = [region for name in names for region in (AWS_EU_REGIONS if name == "eu" else (name,))]
    return [
        {
            "Sid": "ForbidOtherRegions",
            "Effect": "Deny",
            "Action": [f"{service}:*" for service in services],
            "Resource": ["*"],
            "Condition": {"StringNotEquals": {"aws:RequestedRegion": regions}},
        }
    ]


def _find_region(config: Config) -> str | None:
    """Find the region of the cluster, or the one that AWS is asked by."""
    own = config.cluster.region if isinstance(config.cluster, EC2ClusterConfig) else None
    return own or find_default_region()


def _find_partition(region: str | None) -> str:
    """Find the partition of AWS in which a region is."""
    return next((name for start, name in _PARTITIONS.items() if region and region.startswith(start)), "aws")


def _list_places(config: Config) -> Iterator[_Place]:
    """List the places in S3; a public bucket that is read without credentials needs nothing."""
    source = config.input
    for kind, url, section in (
        ("Input", source.url, source),
        ("Manifest", source.manifest or "", source),
        ("Weights", config.model.weights, config.model),
        ("Output", config.output.url, config.output),
    ):
        # Of an archive, it is the archive that is read.
        url = Location(url).base.url
        if url.startswith(_S3) and not section.storage_options.get("anon"):
            yield _locate(kind, url, section.region or _find_region(config))


def _locate(kind: str, url: str, region: str | None) -> _Place:
    """Name a place as IAM does, for which stars, question marks and dollar signs are written as variables."""
    name = re.sub(r"[*?$]", r"${\g<0>}", url.partition("://")[2].strip("/"))
    bucket, _, prefix = name.partition("/")
    names = [name] if prefix and kind != "Output" else []
    # What is written lies inside the folder; whether that of the images is there is asked by its own name, too.
    names += [f"{name}/*"] if kind in ("Input", "Output") else []
    arn = f"arn:{_find_partition(region)}:s3:::"
    return _Place(kind, arn + bucket, prefix, tuple(arn + key for key in names))


def _list_storage(config: Config, role: Role) -> Iterator[Permission]:
    """List what a role needs of S3; on this machine the launcher's processes are the workers."""
    is_both = role == "launcher" and config.cluster.kind == "local"
    for place in _list_places(config):
        listed = {"StringLikeIfExists": {"s3:prefix": [place.prefix, f"{place.prefix}/*"]}} if place.prefix else {}
        for need in _NEEDS[place.kind]:
            reason = "; ".join(filter(None, need.reasons if is_both else [need.reasons[ROLES.index(role)]]))
            resources = (place.bucket,) if need.statement in ("List", "Ask") else place.objects
            # Where S3 asks whether it may say "missing", there is no prefix: hence IfExists.
            conditions = listed if need.statement == "List" else {}
            if reason:
                yield Permission(role, need.statement + place.kind, need.action, resources, reason, conditions)


def _list_key(config: Config, role: Role) -> Iterator[Permission]:
    """List what a role needs of the key with which the output is encrypted, where one is named."""
    asked = config.output.storage_options.get("s3_additional_kwargs") or {}
    key = asked.get("SSEKMSKeyId")
    is_asked = str(asked.get("ServerSideEncryption", "")).startswith("aws:kms")
    if not (key and is_asked and config.output.url.startswith(_S3)):
        return
    region = config.output.region or _find_region(config)
    conditions: dict[str, dict[str, str | list[str]]] = {"StringLike": {"kms:ViaService": "s3.*"}}
    arn = key if key.startswith("arn:") else f"arn:{_find_partition(region)}:kms:{region or '*'}:*:key/{key}"
    head, is_alias, alias = arn.partition("alias/")
    if is_alias:
        # Actions are allowed on keys and not on their other names.
        arn = f"{head.removesuffix('key/')}key/*"
        conditions["ForAnyValue:StringEquals"] = {"kms:ResourceAliases": [is_alias + alias]}
    for action, reason in _KEY_NEEDS:
        yield Permission(role, "UseKey", action, (arn,), reason, conditions)


@dataclass(frozen=True)
class _Cloud:
    """What the launcher needs of EC2."""

    cluster: EC2ClusterConfig
    region: str

    def list_permissions(self, role_name: str | None) -> Iterator[Permission]:
        """List all of it."""
        cluster, makes_group = self.cluster, self.cluster.security_groups is None
        for action, reason in _LOOKS:
            yield self._allow("LookAround", action, ["*"], reason)
        if not (cluster.subnet_id or cluster.vpc) or (makes_group and cluster.use_private_ip):
            yield self._allow("LookAround", "ec2:DescribeVpcs", ["*"], "finds the network and its addresses")
        if makes_group:
            yield self._allow("LookAround", "ec2:DescribeSecurityGroups", ["*"], "finds its security group")
        yield from self._list_launches()
        yield from self._list_roles(role_name)
        if makes_group:
            yield from self._list_groups()

    def _list_launches(self) -> Iterator[Permission]:
        """List what starting, naming and ending instances needs: nothing but fruitdask's own can be touched."""
        cluster, made = self.cluster, [self._name("instance"), self._name("volume")]
        own = {"StringLike": {f"ec2:ResourceTag/{RUN_TAG}": "*"}}
        tagged: Conditions = {
            "StringLike": {f"aws:RequestTag/{RUN_TAG}": "*"},
            "StringEqualsIfExists": {"ec2:InstanceType": sorted(set(cluster.types))},
        }
        used = [
            f"arn:{_find_partition(self.region)}:ec2:{self.region}::image/{cluster.ami or '*'}",
            self._name("network-interface"),
            self._name("subnet", cluster.subnet_id),
            *(self._name("security-group", group) for group in cluster.security_groups or ["*"]),
        ]
        used += [self._name("key-pair", cluster.key_name)] if cluster.key_name else []
        used += [self._name("spot-instances-request")] if cluster.spot else []
        at_launch = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
        run, tag = "ec2:RunInstances", "ec2:CreateTags"
        yield self._allow("Launch", run, made, "starts instances of these types, with fruitdask's tag alone", tagged)
        yield self._allow("LaunchWith", run, used, "starts them with this image, in this network")
        yield self._allow("TagAtLaunch", tag, made, "tags instances and volumes as they are made", at_launch)
        yield self._allow("UseOwn", "ec2:TerminateInstances", made[:1], "ends instances", own)
        yield self._allow("UseOwn", "ec2:GetConsoleOutput", made[:1], "says why an instance did not start", own)

    def _list_groups(self) -> Iterator[Permission]:
        """List what making a security group and letting this machine in needs: groups of others are left alone."""
        (key, value), groups = _GROUP_TAG, [self._name("security-group")]
        tagged, own = ({"StringEquals": {f"{name}/{key}": value}} for name in ("aws:RequestTag", "ec2:ResourceTag"))
        make, at_making = "ec2:CreateSecurityGroup", {"StringEquals": {"ec2:CreateAction": "CreateSecurityGroup"}}
        yield self._allow("MakeGroup", make, groups, "makes a security group, with its tag alone", tagged)
        yield self._allow("MakeGroupIn", make, [self._name("vpc", self.cluster.vpc)], "makes it in this network")
        yield self._allow("TagGroup", "ec2:CreateTags", groups, "tags it as it is made", at_making)
        reach, shut = "lets this machine reach the scheduler", "shuts it out again"
        yield self._allow("OpenGroup", "ec2:AuthorizeSecurityGroupIngress", groups, reach, own)
        yield self._allow("OpenGroup", "ec2:RevokeSecurityGroupIngress", groups, shut, own)

    def _list_roles(self, role_name: str | None) -> Iterator[Permission]:
        """List what giving instances a role, and asking for spot instances, needs of IAM."""
        iam = f"arn:{_find_partition(self.region)}:iam::"
        profile = self.cluster.iam_instance_profile or {}
        name = role_name or (profile.get("Name") or profile.get("Arn", "")).rsplit("/", 1)[-1]
        if profile and name:
            account = profile["Arn"].split(":")[4] if "Arn" in profile else "*"
            suffix = ".cn" if self.region.startswith("cn-") else ""
            to_ec2 = {"StringEquals": {"iam:PassedToService": f"ec2.amazonaws.com{suffix}"}}
            reason = "gives instances the role of their instance profile"
            yield Permission("launcher", "PassRole", "iam:PassRole", (f"{iam}{account}:role/{name}",), reason, to_ec2)
        if self.cluster.spot:
            arn = f"{iam}*:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
            for_spot = {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}
            reason = "the first spot request of an account makes this role"
            yield Permission("launcher", "AskForSpot", "iam:CreateServiceLinkedRole", (arn,), reason, for_spot)

    def _name(self, kind: str, name: str | None = None) -> str:
        """Name resources of the region."""
        return f"arn:{_find_partition(self.region)}:ec2:{self.region}:*:{kind}/{name or '*'}"

    def _allow(
        self, statement: str, action: str, resources: list[str], reason: str, conditions: Conditions | None = None
    ) -> Permission:
        """Allow the launcher an action of EC2 in the cluster's region."""
        here: dict[str, str | list[str]] = {"aws:RequestedRegion": self.region}
        given = dict(conditions or {})
        given["StringEquals"] = here | dict(given.get("StringEquals", {}))
        return Permission("launcher", statement, action, tuple(resources), reason, given)
