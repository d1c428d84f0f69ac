"""IAM policies for a configuration: what the launcher and the workers may do, where, on what conditions, and why.

The tables below are the only source of the policies, of their explanation, and of the permissions in a plan.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

from fruitdask.cluster.ec2.network import GROUP_TAG
from fruitdask.cluster.regions import AWS_EU_REGIONS
from fruitdask.core.aws import RUN_TAG, find_default_region
from fruitdask.core.config import Config, EC2ClusterConfig
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError

Role = Literal["launcher", "workers"]
Conditions = Mapping[str, Mapping[str, str | list[str]]]

#: The launcher runs fruitdask; the workers compute, with the role of their instance profile.
ROLES: tuple[Role, ...] = ("launcher", "workers")

#: Partitions of AWS by the prefix of their regions; all others are in ``aws``.
_PARTITIONS = {"cn-": "aws-cn", "us-gov-": "aws-us-gov", "eusc-": "aws-eusc"}
_S3 = ("s3://", "s3a://")
_NOT_FORBIDDEN = "lets S3 report a missing object as missing instead of forbidden"


class _Need(NamedTuple):
    """An action on a place in S3: its statement, and why the launcher and the workers need it; empty if they do not."""

    statement: Literal["List", "Ask", "Read", "Write"]
    action: str
    reasons: tuple[str, str]


_LIST_ONE = _Need("List", "s3:ListBucket", (_NOT_FORBIDDEN, ""))
_CLEAN_UP = "cleans up when a large upload fails"
#: Actions by place; ``List`` and ``Ask`` concern buckets, ``Read`` and ``Write`` objects.
_NEEDS: Mapping[str, tuple[_Need, ...]] = {
    "Input": (
        _Need("List", "s3:ListBucket", ("lists the images, and finds the bucket's region", _NOT_FORBIDDEN)),
        _Need("Read", "s3:GetObject", ("checks the folder; tries some images (fruitdask plan)", "reads the images")),
    ),
    "Manifest": (_LIST_ONE, _Need("Read", "s3:GetObject", ("reads the table of paths and labels", ""))),
    "Inventory": (_LIST_ONE, _Need("Read", "s3:GetObject", ("reads the names and sizes of the images", ""))),
    "Weights": (_LIST_ONE, _Need("Read", "s3:GetObject", ("reads the weights to build the network", ""))),
    "Output": (
        _Need("List", "s3:ListBucket", ("finds earlier results, and the bucket's region", _NOT_FORBIDDEN)),
        _Need("Ask", "s3:GetBucketVersioning", ("checks whether erased results remain as older versions", "")),
        _Need("Write", "s3:GetObject", ("reads results to resume, reduce and draw", "reads the metadata of arrays")),
        _Need("Write", "s3:PutObject", ("writes manifest, tables, figures and page", "writes features and outcomes")),
        _Need("Write", "s3:DeleteObject", ("deletes replaced or erased results", "deletes empty chunks")),
        _Need("Write", "s3:AbortMultipartUpload", (_CLEAN_UP, _CLEAN_UP)),
    ),
}
_KEY_NEEDS = (
    ("kms:GenerateDataKey", "encrypts what it writes to the output"),
    ("kms:Decrypt", "reads it again, and finishes large uploads"),
)
#: Queries of EC2, which have no resource.
_QUERIES = (
    ("ec2:DescribeInstances", "finds instances that have started, were interrupted, or were left behind"),
    ("ec2:DescribeImages", "finds the machine image"),
    ("ec2:DescribeInstanceTypes", "finds the processors, memory and GPUs of instance types"),
    ("ec2:DescribeInstanceTypeOfferings", "finds zones that offer the instance types"),
    ("ec2:DescribeSubnets", "finds the subnet"),
)


@dataclass(frozen=True)
class Permission:
    """An action that a role needs."""

    role: Role
    #: Name of the policy's statement, which has one set of resources and conditions.
    statement: str
    action: str
    #: ARNs of its resources; ``*`` if AWS has no resource for it.
    resources: tuple[str, ...]
    reason: str
    conditions: Conditions = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """A folder or file in S3: its kind, the ARNs of its bucket and objects, and its name in the bucket."""

    kind: str
    bucket: str
    prefix: str
    objects: tuple[str, ...]


def list_actions(config: Config, *, role_name: str | None = None) -> list[Permission]:
    """List the permissions that a configuration needs on AWS."""
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
    """Build one statement of the permissions that share it."""
    first = permissions[0]
    statement: dict[str, Any] = {
        "Sid": first.statement,
        "Effect": "Allow",
        "Action": [permission.action for permission in permissions],
        "Resource": list(first.resources),
    }
    return statement | ({"Condition": first.conditions} if first.conditions else {})


def _forbid_regions(config: Config, permissions: list[Permission]) -> list[dict[str, Any]]:
    """Deny all regions except the allowed ones, whatever other policies allow; IAM has no region."""
    services = sorted({permission.action.split(":")[0] for permission in permissions} - {"iam"})
    allowed = config.privacy.allowed_regions
    if allowed is None or not services:
        return []
    names = (allowed,) if isinstance(allowed, str) else allowed
    regions = [region for name in names for region in (AWS_EU_REGIONS if name == "eu" else (name,))]
    actions, condition = [f"{service}:*" for service in services], {"aws:RequestedRegion": regions}
    sid, unless_allowed = "ForbidOtherRegions", {"StringNotEquals": condition}
    return [{"Sid": sid, "Effect": "Deny", "Action": actions, "Resource": ["*"], "Condition": unless_allowed}]


def _find_region(config: Config) -> str | None:
    """Find the region of the cluster, by default that of the AWS profile or environment."""
    own = config.cluster.region if isinstance(config.cluster, EC2ClusterConfig) else None
    return own or find_default_region()


def _find_partition(region: str | None) -> str:
    """Find the AWS partition of a region."""
    return next((name for start, name in _PARTITIONS.items() if region and region.startswith(start)), "aws")


def _list_places(config: Config) -> Iterator[_Place]:
    """List the places in S3; a public bucket that is read without credentials needs no permission."""
    source = config.input
    for kind, url, section in (
        ("Input", source.url, source),
        ("Manifest", source.manifest or "", source),
        ("Inventory", _find_report(source.inventory or ""), source),
        ("Weights", config.model.weights, config.model),
        ("Output", config.output.url, config.output),
    ):
        # A folder in an archive needs its archive.
        url = Location(url).base.url
        if url.startswith(_S3) and not section.storage_options.get("anon"):
            yield _locate(kind, url, section.region or _find_region(config))


def _find_report(url: str) -> str:
    """Find the folder of all reports of an S3 Inventory, whose files are beside the folders of the manifests."""
    parts = url.split("/")
    return "/".join([*parts[: max(3, len(parts) - 2)], ""]) if url.lower().endswith(".json") else url


def _locate(kind: str, url: str, region: str | None) -> _Place:
    """Locate a place by ARNs, in which stars, question marks and dollar signs are variables."""
    name = re.sub(r"[*?$]", r"${\g<0>}", url.partition("://")[2].strip("/"))
    bucket, _, prefix = name.partition("/")
    names = [name] if prefix and kind != "Output" else []
    # Outputs are inside the folder; the existence of the input folder is checked by its own name, too.
    names += [f"{name}/*"] if kind in ("Input", "Output") or url.endswith("/") else []
    arn = f"arn:{_find_partition(region)}:s3:::"
    return _Place(kind, arn + bucket, prefix, tuple(arn + key for key in names))


def _list_storage(config: Config, role: Role) -> Iterator[Permission]:
    """List what a role needs on S3; with a local cluster, the launcher also does the workers' part."""
    is_both = role == "launcher" and config.cluster.kind == "local"
    for place in _list_places(config):
        listed = {"StringLikeIfExists": {"s3:prefix": [place.prefix, f"{place.prefix}/*"]}} if place.prefix else {}
        for need in _NEEDS[place.kind]:
            reason = "; ".join(
                dict.fromkeys(filter(None, need.reasons if is_both else [need.reasons[ROLES.index(role)]]))
            )
            resources = (place.bucket,) if need.statement in ("List", "Ask") else place.objects
            # S3 also checks this permission, without a prefix, before it reports an object as missing: hence IfExists.
            conditions = listed if need.statement == "List" else {}
            if reason:
                yield Permission(role, need.statement + place.kind, need.action, resources, reason, conditions)


def _list_key(config: Config, role: Role) -> Iterator[Permission]:
    """List what a role needs on the KMS key of the output, if there is one."""
    options = config.output.storage_options.get("s3_additional_kwargs") or {}
    key, encryption = options.get("SSEKMSKeyId"), str(options.get("ServerSideEncryption", ""))
    if not (key and encryption.startswith("aws:kms") and config.output.url.startswith(_S3)):
        return
    region = config.output.region or _find_region(config)
    conditions: dict[str, dict[str, str | list[str]]] = {"StringLike": {"kms:ViaService": "s3.*"}}
    arn = key if key.startswith("arn:") else f"arn:{_find_partition(region)}:kms:{region or '*'}:*:key/{key}"
    head, is_alias, alias = arn.partition("alias/")
    if is_alias:
        # IAM allows actions on keys, not on aliases.
        arn = f"{head.removesuffix('key/')}key/*"
        conditions["ForAnyValue:StringEquals"] = {"kms:ResourceAliases": [is_alias + alias]}
    for action, reason in _KEY_NEEDS:
        yield Permission(role, "UseKey", action, (arn,), reason, conditions)


@dataclass(frozen=True)
class _Cloud:
    """The permissions of the launcher on EC2."""

    cluster: EC2ClusterConfig
    region: str

    def list_permissions(self, role_name: str | None) -> Iterator[Permission]:
        """List all of them."""
        cluster, makes_group = self.cluster, self.cluster.security_groups is None
        for action, reason in _QUERIES:
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
        """List permissions to start, tag and end instances, restricted to those of fruitdask."""
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
        yield self._allow("Launch", run, made, "starts instances of these types, only with fruitdask's tag", tagged)
        yield self._allow("LaunchWith", run, used, "starts them with this image, in this network")
        yield self._allow("TagAtLaunch", tag, made, "tags instances and volumes at launch", at_launch)
        yield self._allow("UseOwn", "ec2:TerminateInstances", made[:1], "terminates instances", own)
        yield self._allow("UseOwn", "ec2:GetConsoleOutput", made[:1], "explains why an instance did not start", own)

    def _list_groups(self) -> Iterator[Permission]:
        """List permissions to make a security group and to admit this machine, restricted to groups of fruitdask."""
        (key, value), groups = GROUP_TAG, [self._name("security-group")]
        tagged, own = ({"StringEquals": {f"{name}/{key}": value}} for name in ("aws:RequestTag", "ec2:ResourceTag"))
        make, at_making = "ec2:CreateSecurityGroup", {"StringEquals": {"ec2:CreateAction": "CreateSecurityGroup"}}
        yield self._allow("MakeGroup", make, groups, "makes a security group, only with its tag", tagged)
        yield self._allow("MakeGroupIn", make, [self._name("vpc", self.cluster.vpc)], "makes it in this network")
        yield self._allow("TagGroup", "ec2:CreateTags", groups, "tags it at creation", at_making)
        reach, revoke = "admits this machine to the scheduler", "revokes that again"
        yield self._allow("OpenGroup", "ec2:AuthorizeSecurityGroupIngress", groups, reach, own)
        yield self._allow("OpenGroup", "ec2:RevokeSecurityGroupIngress", groups, revoke, own)

    def _list_roles(self, role_name: str | None) -> Iterator[Permission]:
        """List permissions on IAM: to give instances a role, and to use spot instances."""
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
            reason = "creates this role at the first spot request of an account"
            yield Permission("launcher", "AskForSpot", "iam:CreateServiceLinkedRole", (arn,), reason, for_spot)

    def _name(self, kind: str, name: str | None = None) -> str:
        """Build the ARN of resources in the region."""
        return f"arn:{_find_partition(self.region)}:ec2:{self.region}:*:{kind}/{name or '*'}"

    def _allow(
        self, statement: str, action: str, resources: list[str], reason: str, conditions: Conditions | None = None
    ) -> Permission:
        """Allow the launcher an action on EC2 in the cluster's region."""
        here: dict[str, str | list[str]] = {"aws:RequestedRegion": self.region}
        given = dict(conditions or {})
        given["StringEquals"] = here | dict(given.get("StringEquals", {}))
        return Permission("launcher", statement, action, tuple(resources), reason, given)
