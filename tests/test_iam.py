"""Policies suffice and say no more than they must: by AWS's own data, by a moto that enforces them, and by AWS's rules.

How far moto's enforcement goes (5.2): it knows actions, and resources of S3, but not those of EC2, tags given at
launch, or the role that is passed. It takes every condition for met, also those of a Deny, which then forbids all; asks
for ``s3:HeadBucket`` where S3 asks for ``s3:ListBucket``; asks for DeleteObject on the bucket where many objects are
deleted at once; and says that an object is missing also to those who may not list. `loosen` makes up for what would be
refused. For the rest, what was asked of moto and of the loopback EC2 is judged by `is_allowed`, which follows AWS's
documented rules.
"""

import functools
import json
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore import xform_name
from botocore.exceptions import ClientError
from cfnlint.api import lint
from cfnlint.config import ManualArgs
from cfnlint.data import AdditionalSpecs
from cfnlint.helpers import load_resource
from click.testing import CliRunner
from distributed import Client, LocalCluster
from hypothesis import given, settings, strategies
from loopback_ec2 import LoopbackEC2
from s3fs import S3FileSystem

import fruitdask
from fruitdask.cli import cli
from fruitdask.cluster import open_client
from fruitdask.cluster.ec2.policies import ROLES, Permission, build_policies, list_actions
from fruitdask.cluster.regions import AWS_EU_REGIONS, EU_REGIONS
from fruitdask.core import aws
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.sample import draw_sample
from fruitdask.core.storage import Location, hash_file
from fruitdask.errors import ConfigError, FruitdaskError, StorageError

pytestmark = pytest.mark.cloud

Policy = dict[str, Any]
Context = Mapping[str, str | list[str]]
Question = tuple[str, str, Context]

#: What AWS publishes about its actions, as the linter of CloudFormation keeps it.
ACTIONS = load_resource(AdditionalSpecs, "Policies.json")
#: File systems of this module: s3fs keeps them by their options alone, to which keys and servers in the environment do
#: not belong.
FILE_SYSTEMS: dict[str, S3FileSystem] = {}
EC2 = {
    "kind": "ec2",
    "region": "eu-west-1",
    "docker_image": "example/fruitdask",
    "spot": True,
    "ami": "ami-1",
    "subnet_id": "subnet-1",
    "key_name": "mine",
    "iam_instance_profile": {"Name": "fruits"},
}


@pytest.fixture(autouse=True)
def no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the region of whoever runs the tests out of the policies."""
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")


def load(**sections: Any) -> Config:
    """Load a configuration on S3 with some sections of a test's own."""
    places = {"input": {"url": "s3://photos/set/fruits"}, "output": {"url": "s3://results/a/run"}}
    return fruitdask.load_config(places | sections)


# -- AWS's rules


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of IAM's, in which ``${*}`` stands for a star."""
    parts = re.split(r"(\$\{[*?$]\}|[*?])", pattern)
    words = {"*": ".*", "?": "."}
    return re.compile("".join(words.get(part) or re.escape(part[2] if part[:2] == "${" else part) for part in parts))


def match(pattern: str, text: str) -> bool:
    """Match a text with a pattern."""
    return compile_pattern(pattern).fullmatch(text) is not None


def holds(operator: str, expected: str | list[str], found: str | list[str] | None) -> bool:
    """Tell whether a condition holds for the values of a key; None where the request has no such key."""
    quantifier, _, test = operator.rpartition(":")
    if found is None:
        return quantifier == "ForAllValues" or test.endswith("IfExists") or test.startswith("StringNot")
    patterns, values = ([part] if isinstance(part, str) else part for part in (expected, found))
    fits = [any(match(one, value) if "Like" in test else one == value for one in patterns) for value in values]
    if test.startswith("StringNot"):
        return not any(fits)
    return any(fits) if quantifier == "ForAnyValue" else all(fits)


def concerns(statement: dict[str, Any], action: str, resource: str, context: Context) -> bool:
    """Tell whether a statement is about a request."""
    conditions = [
        (operator, expected, context.get(key))
        for operator, keys in statement.get("Condition", {}).items()
        for key, expected in keys.items()
    ]
    return (
        any(match(pattern, action) for pattern in statement["Action"])
        and any(match(pattern, resource) for pattern in statement["Resource"])
        and all(holds(*condition) for condition in conditions)
    )


def is_allowed(policy: Policy, action: str, resource: str, context: Context) -> bool:
    """Judge a request: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html"""
    effects = {part["Effect"] for part in policy["Statement"] if concerns(part, action, resource, context)}
    return effects == {"Allow"}


def without(policy: Policy, action: str, *, sid: str | None = None) -> Policy:
    """Take an action out of a policy, or out of one of its statements."""
    statements = [
        part | {"Action": [one for one in part["Action"] if one != action or sid not in (None, part["Sid"])]}
        for part in policy["Statement"]
    ]
    return policy | {"Statement": [part for part in statements if part["Action"]]}


# -- the documents

NEEDS = [
    need
    for need in list_actions(
        load(
            input={"url": "s3://photos/set/fruits", "manifest": "s3://lists/all.csv"},
            model={"weights": "s3://nets/w.h5"},
        )
    )
]
KEY = "0a1b2c3d-0000-1111-2222-333344445555"
KINDS = strategies.sampled_from(
    [
        {"kind": "local"},
        {"kind": "address", "address": "tcp://10.0.0.5:8786"},
        EC2,
        {
            "kind": "ec2",
            "region": "cn-north-1",
            "docker_image": "x",
            "iam_instance_profile": {"Arn": "arn:aws-cn:iam::123456789012:instance-profile/w"},
        },
        {
            "kind": "ec2",
            "region": "us-gov-west-1",
            "docker_image": "x",
            "security_groups": ["sg-1", "sg-2"],
            "vpc": "vpc-1",
        },
    ]
)
URLS = strategies.sampled_from(
    [
        "s3://bucket",
        "s3://bucket/",
        "s3a://bucket/a",
        "s3://my.bucket/a b/c*d/$x?",
        "/data/here",
        "https://example.org/fruits",
    ]
)
KEYS = strategies.sampled_from([None, KEY, "alias/fruits", f"arn:aws:kms:eu-west-1:123456789012:key/{KEY}"])


@strategies.composite
def configs(draw: Any) -> Config:
    """Draw configurations of all kinds of places and clusters."""
    source, name = draw(URLS), draw(strategies.sampled_from(["w.keras", "s3://nets/w.keras"]))
    extra = {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": draw(KEYS)}}
    return fruitdask.load_config(
        {
            "input": {"url": source, "manifest": draw(strategies.sampled_from([None, "s3://bucket/list.csv"]))},
            "model": {"weights": name, "preprocessing": "none"},
            "cluster": draw(KINDS),
            "privacy": {"allowed_regions": draw(strategies.sampled_from([None, "eu", ["eu", "us-east-1"]]))},
            "output": {"url": draw(URLS), "storage_options": extra},
        }
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(configs())
def test_policies_name_each_action_and_scope_what_aws_can_scope(config: Config) -> None:
    for policy in build_policies(config).values():
        names = [part["Sid"] for part in policy["Statement"]]
        assert len(names) == len(set(names))
        for part in policy["Statement"]:
            if part["Effect"] == "Deny":
                assert set(part["Condition"]) == {"StringNotEquals"}
                continue
            for action in part["Action"]:
                service, _, name = action.partition(":")
                assert "*" not in action
                has_resources = "Resources" in ACTIONS[service]["Actions"][name.lower()]
                assert ("*" in part["Resource"]) is not has_resources
                # What EC2 cannot scope by resource it can by region.
                assert has_resources or "aws:RequestedRegion" in part["Condition"]["StringEquals"]


def test_policies_are_in_order_by_the_linter_of_aws() -> None:
    clusters = [EC2, EC2 | {"security_groups": ["sg-1"], "region": "cn-north-1"}, {"kind": "local"}]
    encryption = {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/fruits"}}
    loaded = [
        load(
            cluster=cluster,
            input={"url": "s3://photos/set", "manifest": "s3://photos/list.csv"},
            model={"weights": "s3://nets/w.keras", "preprocessing": "none"},
            privacy={"allowed_regions": "eu"},
            output={"url": "s3://results/a/run", "storage_options": encryption},
        )
        for cluster in clusters
    ]
    policies = [policy for config in loaded for policy in build_policies(config).values()]
    # A mistake in each of three statements shows that the linter looks.
    wrong: list[Policy] = json.loads(json.dumps(policies[0]))["Statement"][:3]
    wrong[0]["Action"], wrong[1]["Resource"], wrong[2]["Condition"] = (
        ["s3:ListBuckets"],
        ["arn:aws:iam::1:role/x"],
        {"Like": {}},
    )
    resources = {
        f"Policy{number}": {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy}}
        for number, policy in enumerate([*policies, {"Version": "2012-10-17", "Statement": wrong}])
    }
    template = json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": resources})
    found = lint(template, config=ManualArgs(regions=["eu-west-1"], include_checks=["I", "W", "E"]))
    rules = {"E3510": "document", "I3510": "resource", "W3037": "action"}
    about = {(str(mistake.path[1]), rules[mistake.rule.id]) for mistake in found if mistake.rule.id in rules}
    assert about == {(f"Policy{len(policies)}", rule) for rule in rules.values()}


def test_policies_fit_into_what_iam_stores() -> None:
    options = {
        "s3_additional_kwargs": {
            "ServerSideEncryption": "aws:kms",
            "SSEKMSKeyId": f"arn:aws:kms:eu-west-1:123456789012:key/{KEY}",
        }
    }
    config = load(
        cluster=EC2 | {"security_groups": None},
        input={
            "url": "s3://a-bucket-with-a-long-name-of-photographs/2026/november/fruits",
            "manifest": "s3://a-bucket/list.csv",
        },
        model={"weights": "s3://a-bucket/networks/of/ours/mobilenet.weights.h5"},
        privacy={"allowed_regions": "eu"},
        output={"url": "s3://another-bucket-with-a-long-name/results/2026/november/run-1", "storage_options": options},
    )
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html: a managed policy, without white space.
    sizes = {role: len(json.dumps(policy, separators=(",", ":"))) for role, policy in build_policies(config).items()}
    assert max(sizes.values()) <= 6144


@pytest.mark.parametrize("region", ["eu-west-1", "cn-north-1", "us-gov-west-1", "eusc-de-east-1"])
def test_partition_is_that_of_the_region(region: str) -> None:
    config = load(cluster=EC2 | {"region": region})
    partition = botocore.session.Session().get_partition_for_region(region)
    arns = [arn for need in list_actions(config) for arn in need.resources if arn != "*"]
    assert {arn.split(":")[1] for arn in arns} == {partition}


def test_regions_of_the_european_union_are_the_same_everywhere() -> None:
    session = botocore.session.Session()
    known = {region for part in ("aws", "aws-eusc") for region in session.get_available_regions("ec2", part)}
    assert known & set(EU_REGIONS) == set(AWS_EU_REGIONS)


def test_public_and_local_places_need_nothing() -> None:
    config = load(input={"url": "s3://open/fruits", "storage_options": {"anon": True}}, output={"url": "/tmp/run"})
    assert list_actions(config) == []
    assert build_policies(config)["workers"]["Statement"] == []


def test_region_must_be_known_for_a_cluster_on_ec2(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(cluster=EC2 | {"region": None})
    with pytest.raises(ConfigError, match="no AWS region is set for the cluster; give cluster.region"):
        build_policies(config)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert "arn:aws:ec2:eu-west-3:*:instance/*" in {arn for need in list_actions(config) for arn in need.resources}


HERE = {"aws:RequestedRegion": "eu-west-1"}
OWN = HERE | {"ec2:ResourceTag/fruitdask:run": "r1"}
LAUNCH = HERE | {"aws:RequestTag/fruitdask:run": "r1", "ec2:InstanceType": "m6i.large"}
AT_LAUNCH = HERE | {"ec2:CreateAction": "RunInstances"}
INSTANCE = "arn:aws:ec2:eu-west-1:123456789012:instance/i-1"
VOLUME = "arn:aws:ec2:eu-west-1:123456789012:volume/vol-1"
GROUP = "arn:aws:ec2:eu-west-1:123456789012:security-group/sg-1"
OWN_GROUP = HERE | {"ec2:ResourceTag/fruitdask": "cluster"}
FRUITS = "arn:aws:iam::123456789012:role/fruits"
SPOT = "arn:aws:iam::123456789012:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
PHOTOS, RESULTS = "arn:aws:s3:::photos", "arn:aws:s3:::results"
TO_EC2, TO_LAMBDA = ({"iam:PassedToService": f"{service}.amazonaws.com"} for service in ("ec2", "lambda"))


@pytest.mark.parametrize(
    ("expected", "action", "resource", "context"),
    [
        pytest.param(True, "ec2:RunInstances", INSTANCE, LAUNCH, id="launch with the tag"),
        pytest.param(
            True, "ec2:RunInstances", VOLUME, HERE | {"aws:RequestTag/fruitdask:run": "r1"}, id="volume with it"
        ),
        pytest.param(
            False, "ec2:RunInstances", INSTANCE, HERE | {"ec2:InstanceType": "m6i.large"}, id="without the tag"
        ),
        pytest.param(
            False, "ec2:RunInstances", INSTANCE, LAUNCH | {"ec2:InstanceType": "p5.48xlarge"}, id="another type"
        ),
        pytest.param(
            False, "ec2:RunInstances", INSTANCE, LAUNCH | {"aws:RequestedRegion": "us-east-1"}, id="elsewhere"
        ),
        pytest.param(True, "ec2:RunInstances", "arn:aws:ec2:eu-west-1::image/ami-1", HERE, id="the image"),
        pytest.param(False, "ec2:RunInstances", "arn:aws:ec2:eu-west-1::image/ami-2", HERE, id="another image"),
        pytest.param(True, "ec2:CreateTags", INSTANCE, AT_LAUNCH, id="tag at launch"),
        pytest.param(False, "ec2:CreateTags", INSTANCE, HERE, id="adopt an instance"),
        pytest.param(False, "ec2:CreateTags", INSTANCE, OWN, id="tag an instance later"),
        pytest.param(True, "ec2:TerminateInstances", INSTANCE, OWN, id="end its own"),
        pytest.param(False, "ec2:TerminateInstances", INSTANCE, HERE, id="end another's"),
        pytest.param(True, "ec2:DescribeInstances", "*", HERE, id="look here"),
        pytest.param(False, "ec2:DescribeInstances", "*", {"aws:RequestedRegion": "eu-west-3"}, id="look elsewhere"),
        pytest.param(
            True, "ec2:CreateSecurityGroup", GROUP, HERE | {"aws:RequestTag/fruitdask": "cluster"}, id="a group"
        ),
        pytest.param(False, "ec2:CreateSecurityGroup", GROUP, HERE, id="a group without the tag"),
        pytest.param(True, "ec2:AuthorizeSecurityGroupIngress", GROUP, OWN_GROUP, id="open its group"),
        pytest.param(False, "ec2:AuthorizeSecurityGroupIngress", GROUP, HERE, id="open another's"),
        pytest.param(True, "iam:PassRole", FRUITS, TO_EC2, id="pass the role"),
        pytest.param(False, "iam:PassRole", FRUITS, TO_LAMBDA, id="pass it to another service"),
        pytest.param(False, "iam:PassRole", FRUITS[:-6] + "admin", TO_EC2, id="pass another role"),
        pytest.param(
            True, "iam:CreateServiceLinkedRole", SPOT, {"iam:AWSServiceName": "spot.amazonaws.com"}, id="spot"
        ),
        pytest.param(True, "s3:GetObject", f"{PHOTOS}/set/fruits/a/1.jpg", HERE, id="read an image"),
        pytest.param(False, "s3:GetObject", f"{PHOTOS}/set/fruits2/1.jpg", HERE, id="read the folder next to it"),
        pytest.param(False, "s3:PutObject", f"{PHOTOS}/set/fruits/a/1.jpg", HERE, id="write an image"),
        pytest.param(True, "s3:ListBucket", PHOTOS, HERE | {"s3:prefix": "set/fruits/"}, id="list the images"),
        pytest.param(False, "s3:ListBucket", PHOTOS, HERE | {"s3:prefix": "set/"}, id="list what is around them"),
        pytest.param(
            False, "s3:GetObject", f"{RESULTS}/a/run/x", HERE | {"aws:RequestedRegion": "us-east-1"}, id="Ohio"
        ),
    ],
)
def test_launcher_may_do_this_and_not_that(expected: bool, action: str, resource: str, context: Context) -> None:
    policies = build_policies(load(cluster=EC2, privacy={"allowed_regions": "eu"}))
    assert is_allowed(policies["launcher"], action, resource, context) is expected
    assert not action.startswith(("ec2", "iam")) or not is_allowed(policies["workers"], action, resource, context)


def test_names_with_wildcards_mean_themselves() -> None:
    policy = build_policies(load(input={"url": "s3://photos/a*b?"}))["workers"]
    assert is_allowed(policy, "s3:GetObject", f"{PHOTOS}/a*b?/1.jpg", {})
    assert not is_allowed(policy, "s3:GetObject", f"{PHOTOS}/axbx/1.jpg", {})


def test_security_groups_that_are_given_are_neither_made_nor_opened() -> None:
    needs = {need.action for need in list_actions(load(cluster=EC2 | {"security_groups": ["sg-1"]}))}
    assert not {action for action in needs if action.endswith(("SecurityGroup", "SecurityGroupIngress"))}


# -- the command


def invoke(tmp_path: Path, *arguments: str, **cluster: Any) -> Any:
    """Run the command on a configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps({"input": {"url": "s3://photos/set"}, "cluster": cluster, "output": {"url": "s3://results"}})
    )
    return CliRunner().invoke(cli, ["iam-policy", str(path), *arguments])


def test_command_prints_both_policies_or_one(tmp_path: Path) -> None:
    both = json.loads(invoke(tmp_path, kind="local").stdout)
    assert list(both) == list(ROLES)
    assert json.loads(invoke(tmp_path, "--role", "workers", kind="local").stdout) == both["workers"]


def test_command_explains_each_action(tmp_path: Path) -> None:
    shown = invoke(tmp_path, "--explain", "--set", "privacy.allowed_regions=eu", **EC2).stdout
    config = load(cluster=EC2, input={"url": "s3://photos/set"}, output={"url": "s3://results"})
    for need in list_actions(config):
        assert re.search(rf"^    {need.action} +{re.escape(need.reason)}$", shown, re.MULTILINE)
    assert "if aws:RequestedRegion StringNotEquals eu-central-1, eu-north-1" in shown
    assert "launcher" not in invoke(tmp_path, "--explain", "--role", "workers", **EC2).stdout


def test_command_says_what_it_takes_for_granted(tmp_path: Path) -> None:
    guessed, named = invoke(tmp_path, **EC2), invoke(tmp_path, "--role-name", "theirs", **EC2)
    assert "if not, give --role-name" in guessed.stderr
    assert '"arn:aws:iam::*:role/fruits"' in guessed.stdout
    assert named.stderr == ""
    assert '"arn:aws:iam::*:role/theirs"' in named.stdout
    assert (
        "needs no permission on AWS"
        in invoke(tmp_path, "--set", "input.url=/a", "--set", "output.url=/b", kind="local").stderr
    )
    assert "workers have no credentials" in invoke(tmp_path, **EC2 | {"iam_instance_profile": None}).stderr


# -- moto

#: A moto in a process of its own, for its enforcement is for all of a process; it writes what S3 was asked into a file.
_SERVER = r"""
import io, json, re, sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
moto, log = DomainDispatcherApplication(create_backend_app), open(sys.argv[1], "a")
class Handler(WSGIRequestHandler):
    def log_request(self, *args): pass
def application(environ, start_response):
    credential = re.search("Credential=([^/]+)/[0-9]+/([^/]+)/s3/", environ.get("HTTP_AUTHORIZATION", ""))
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    def begin(status, *rest):
        if credential:
            method, path, query = (environ[name] for name in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"))
            keys = re.findall("<Key>(.*?)</Key>", body.decode()) if query == "delete" else []
            source = environ.get("HTTP_X_AMZ_COPY_SOURCE")
            log.write(json.dumps([*credential.groups(), method, path, query, source, keys, status[:3]]) + "\n")
            log.flush()
        return start_response(status, *rest)
    return moto(environ, begin)
server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
_ADMIN = {"Version": "2012-10-17", "Statement": [{"Sid": "All", "Effect": "Allow", "Action": ["*"], "Resource": ["*"]}]}


def loosen(policy: Policy) -> Policy:
    """Allow what moto asks for and AWS does not, and leave out what moto does not understand."""
    loose = [part for part in json.loads(json.dumps(policy))["Statement"] if part["Effect"] == "Allow"]
    for part in loose:
        if "s3:ListBucket" in part["Action"]:
            part["Action"].append("s3:HeadBucket")
        if "s3:DeleteObject" in part["Action"]:
            part["Resource"].append(part["Resource"][0].split("/")[0])
        if part["Action"][0].startswith("ec2:"):
            part["Resource"] = ["*"]
    return policy | {"Statement": loose}


def list_questions(line: str) -> Iterator[tuple[str, Question]]:
    """List what S3 would ask IAM for a request: about whom, and action, resource and context."""
    caller, region, method, path, query, source, keys, status = json.loads(line)
    bucket, _, key = path.lstrip("/").partition("/")
    fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    here, arn = {"aws:RequestedRegion": region}, f"arn:aws:s3:::{bucket}"
    if not key and method != "POST":
        prefix = {"s3:prefix": fields["prefix"]} if "prefix" in fields else {}
        action = "s3:GetBucketVersioning" if "versioning" in fields else "s3:ListBucket"
        yield caller, (action, arn, here | prefix)
        return
    actions = {"HEAD": "GetObject", "GET": "GetObject", "PUT": "PutObject"}
    for name in keys or [key]:
        yield caller, (f"s3:{actions.get(method, 'DeleteObject')}", f"{arn}/{name}", here)
    if source is not None:
        yield caller, ("s3:GetObject", f"arn:aws:s3:::{urllib.parse.unquote(source).lstrip('/')}", here)
    if status == "404":
        # Without this permission it would be 403: https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html
        yield caller, ("s3:ListBucket", arn, here)


@dataclass
class Account:
    """An account of moto's, with a launcher and workers who may do what their policies say."""

    url: str
    log: Path
    admin: boto3.Session
    keys: dict[str, dict[str, str]]

    def connect(self, service: str, *, role: str | None = None) -> Any:
        """Open a client of the account's administrator, or of a role."""
        session = boto3.Session(**self.keys[role], region_name="eu-west-1") if role else self.admin
        return session.client(service, endpoint_url=self.url)

    def allow(self, role: str, policy: Policy) -> None:
        """Give a role its policy."""
        with closing(self.connect("iam")) as iam:
            iam.put_user_policy(UserName=role, PolicyName="fruitdask", PolicyDocument=json.dumps(loosen(policy)))

    def list_questions(self, role: str) -> list[Question]:
        """List what S3 would have asked about a role so far."""
        found = (question for line in self.log.read_text().splitlines() for question in list_questions(line))
        return [question for caller, question in found if caller == self.keys[role]["aws_access_key_id"]]

    def copy(self, source: str, target: str) -> None:
        """Copy results."""
        with closing(self.connect("s3")) as s3:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket="results", Prefix=f"{source}/")
            for name in [entry["Key"] for page in pages for entry in page["Contents"]]:
                s3.copy_object(Bucket="results", Key=name.replace(source, target, 1), CopySource=f"results/{name}")

    def configure(self, folder: str, /, **changes: Any) -> Config:
        """Configure a run of everything that can be on S3."""
        sections: dict[str, Any] = {
            "input": {"url": "s3://photos/set/fruits", "manifest": "s3://lists/all.csv"},
            "model": {"weights": "s3://nets/colours.keras", "preprocessing": "none"},
            "featurize": {"images_per_partition": 4, "fetch_attempts": 1, "max_failed_fraction": 0.5},
            "explore": {"input_px": 32, "max_thumbnails": 4},
            "plots": {"enabled": False},
            "privacy": {"allowed_regions": ["eu-west-1"]},
            "output": {"url": f"s3://results/{folder}"},
        }
        return fruitdask.load_config({name: section | changes.get(name, {}) for name, section in sections.items()})


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> Iterator[Account]:
    """An account that enforces policies, with images (four are broken, one is gone), their list, a network, and a
    bucket for results.
    """
    log = tmp_path_factory.mktemp("moto") / "requests"
    environment = os.environ | {"MOTO_EC2_LOAD_DEFAULT_AMIS": "false", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", _SERVER, str(log)]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment
    ) as server:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # However this ends, the process must, for Popen waits for it.
        with ExitStack() as stack:
            stack.callback(server.terminate)
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            first = boto3.Session("first", "first", region_name="eu-west-1")
            iam = stack.enter_context(closing(first.client("iam", endpoint_url=url)))
            keys = {role: create_user(iam, role) for role in ("admin", *ROLES)}
            account = Account(url, log, boto3.Session(**keys["admin"], region_name="eu-west-1"), keys)
            fill_buckets(account, tmp_path_factory.mktemp("images"), Path(tiny_model.weights))
            enforce = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
            urllib.request.urlopen(enforce).close()
            yield account


def create_user(iam: Any, name: str) -> dict[str, str]:
    """Create a user who may do anything for now, and give their keys."""
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="fruitdask", PolicyDocument=json.dumps(_ADMIN))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}


def fill_buckets(account: Account, folder: Path, network: Path) -> None:
    """Put images, their list and a network where a launcher and workers will look for them."""
    draw_sample(folder, per_class=2, size_px=32)
    (folder / "broken").mkdir()
    for number in range(4):
        (folder / "broken" / f"{number}.jpg").write_text("no image")
    images = [path for path in folder.rglob("*") if path.is_file()]
    listed = ["path,label", "gone/1.jpg,gone"] + [f"{path.relative_to(folder)},{path.parent.name}" for path in images]
    with closing(account.connect("s3")) as s3:
        for bucket in ("photos", "lists", "nets", "results"):
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        for path in images:
            s3.put_object(Bucket="photos", Key=f"set/fruits/{path.relative_to(folder)}", Body=path.read_bytes())
        s3.put_object(Bucket="lists", Key="all.csv", Body="\n".join(listed).encode())
        s3.put_object(Bucket="nets", Key="colours.keras", Body=network.read_bytes())


@pytest.fixture(scope="module")
def workers(account: Account) -> Iterator[Client]:
    """A client with the launcher's keys of a cluster whose workers have their own."""
    environments = {role: {name.upper(): key for name, key in account.keys[role].items()} for role in ROLES}
    with pytest.MonkeyPatch.context() as patch:
        for name, key in environments["launcher"].items():
            patch.setenv(name, key)
        patch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        patch.setenv("AWS_ENDPOINT_URL", account.url)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setattr(S3FileSystem, "_cache", FILE_SYSTEMS)
        cluster = LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            # Workers may be forked from a process that was started before, for other tests, with their server.
            env=environments["workers"]
            | {"AWS_DEFAULT_REGION": "eu-west-1"}
            | dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), account.url),
        )
        with cluster, Client(cluster) as client:
            yield client


History = list[tuple[Config, dict[str, list[Question]]]]


@pytest.fixture(scope="module")
def history(account: Account, workers: Client) -> History:
    """All that can be done, by roles that may do no more than their policies say: configurations, and what was asked
    for each.
    """
    config, anew = account.configure("a/run"), account.configure("a/run", output={"overwrite": True})
    history: History = []
    with note_questions(account, config, history):
        fruitdask.explore(config, client=workers)
        by_status = fruitdask.run(anew, client=workers).manifest["counts"]["by_status"]
        assert by_status == {"ok": 12, "unreadable": 4, "missing": 1}
        # One that vanishes after it was listed is asked for all the same.
        vanished = Location(f"{config.input.url}/gone/2.jpg", config.input.storage_options)
        assert isinstance(workers.submit(hash_file, vanished).exception(), StorageError)
        assert fruitdask.run(config, client=workers).n_computed == 0
        # The mark of a partition is deleted, and asked for once more.
        assert fruitdask.run(config, client=workers, retry_failed=True).n_computed == 5
        assert "</html>" in fruitdask.render_report(config).read()
        assert fruitdask.erase(config, ["broken/0.jpg"], client=workers).n_erased == 1
    for changes, message in (
        ({"input": {"url": "s3://photos/set/none", "manifest": None}}, "there is no such folder; check input.url"),
        ({"input": {"manifest": "s3://lists/none.csv"}}, "cannot read s3://lists/none.csv"),
        ({"model": {"weights": "s3://nets/none.keras"}}, "s3://nets/none.keras"),
    ):
        missing = account.configure("a/missing", **changes)
        with note_questions(account, missing, history), pytest.raises(FruitdaskError, match=message):
            fruitdask.run(missing, client=workers)
    return history


@contextmanager
def note_questions(account: Account, config: Config, history: History) -> Iterator[None]:
    """Let roles do what a configuration's policies say, and note what was asked meanwhile."""
    before = {role: len(account.list_questions(role)) for role in ROLES}
    for role, policy in build_policies(config).items():
        account.allow(role, policy)
    yield
    history.append((config, {role: account.list_questions(role)[before[role] :] for role in ROLES}))


@pytest.mark.slow
def test_policies_suffice(history: History) -> None:
    asked = {role: {question[0] for question in history[0][1][role]} for role in ROLES}
    assert asked["launcher"] - asked["workers"] == {"s3:GetBucketVersioning"}
    for config, questions in history:
        for role, policy in build_policies(config).items():
            refused = [question for question in questions[role] if not is_allowed(policy, *question)]
            assert refused == []


@pytest.mark.slow
@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.role}-{need.statement}-{need.action}")
def test_each_action_on_s3_is_asked_for(history: History, need: Permission) -> None:
    if need.action == "s3:AbortMultipartUpload":
        pytest.skip("s3fs uploads in parts what is larger than 100 MB, and gives an upload up when a part fails")
    assert any(
        not is_allowed(policy, *question)
        for config, questions in history
        for policy in [without(build_policies(config)[need.role], need.action, sid=need.statement)]
        for question in questions[need.role]
    )


def explore(config: Config, client: Client) -> None:
    """Explore anew."""
    fruitdask.explore(config, client=client)


def run(config: Config, client: Client) -> None:
    """Run."""
    fruitdask.run(config, client=client)


def overwrite(config: Config, client: Client) -> None:
    """Explore in place of an earlier run."""
    output = config.output.model_copy(update={"overwrite": True})
    fruitdask.explore(config.model_copy(update={"output": output}), client=client)


def report(config: Config, client: Client) -> None:
    """Draw again."""
    fruitdask.render_report(config)


LISTS = pytest.mark.skip(reason="moto says that an object is missing also to those who may not list")
PARTS = pytest.mark.skip(reason="nothing here is so large (100 MB) that it is uploaded in parts")
DELETES = pytest.mark.skip(reason="s3fs passes over what it may not delete, and Zarr takes that for deleted")
ASKS = pytest.mark.skip(reason="who may not ask for versions is told of none")
NONE = {"input": {"url": "s3://photos/none", "manifest": None}}


def name_case(part: Any) -> str:
    """Name a case by its words alone."""
    return part.__name__ if callable(part) else part if isinstance(part, str) and " " not in part else ""


#: What fails, and how, without an action of a statement.
REFUSALS: list[Any] = [
    (
        "launcher",
        "ListInput",
        "s3:ListBucket",
        explore,
        {},
        "cannot list s3://photos/set/fruits: ListObjectsV2: Access",
    ),
    ("launcher", "ReadInput", "s3:GetObject", explore, NONE, "cannot read s3://photos/none: HeadObject: Forbidden"),
    pytest.param("launcher", "ListManifest", "s3:ListBucket", explore, {}, "", marks=LISTS),
    ("launcher", "ReadManifest", "s3:GetObject", explore, {}, "cannot read s3://lists/all.csv"),
    pytest.param("launcher", "ListWeights", "s3:ListBucket", run, {}, "", marks=LISTS),
    ("launcher", "ReadWeights", "s3:GetObject", run, {}, "cannot read s3://nets/colours.keras"),
    ("launcher", "ListOutput", "s3:ListBucket", explore, {}, "cannot read s3://results/"),
    pytest.param("launcher", "AskOutput", "s3:GetBucketVersioning", explore, {}, "", marks=ASKS),
    ("launcher", "WriteOutput", "s3:GetObject", report, {}, "cannot read s3://results/"),
    ("launcher", "WriteOutput", "s3:PutObject", report, {}, "cannot write s3://results/"),
    ("launcher", "WriteOutput", "s3:DeleteObject", overwrite, {}, "cannot delete s3://results/.*s3:DeleteObject"),
    pytest.param("launcher", "WriteOutput", "s3:AbortMultipartUpload", explore, {}, "", marks=PARTS),
    pytest.param("workers", "ListInput", "s3:ListBucket", explore, {}, "", marks=LISTS),
    ("workers", "ReadInput", "s3:GetObject", run, {}, r"\d+ of 17 images failed"),
    pytest.param("workers", "ListOutput", "s3:ListBucket", explore, {}, "", marks=LISTS),
    ("workers", "WriteOutput", "s3:GetObject", explore, {}, "the comparison of .* GetObject: Access Denied"),
    ("workers", "WriteOutput", "s3:PutObject", explore, {}, "partition 0 .* PutObject: Access Denied"),
    pytest.param("workers", "WriteOutput", "s3:DeleteObject", run, {}, "", marks=DELETES),
    pytest.param("workers", "WriteOutput", "s3:AbortMultipartUpload", explore, {}, "", marks=PARTS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("role", "sid", "action", "do", "changes", "message"), REFUSALS, ids=name_case)
def test_moto_refuses_without_an_action(
    account: Account,
    workers: Client,
    history: History,
    role: str,
    sid: str,
    action: str,
    do: Callable[[Config, Client], None],
    changes: Any,
    message: str,
) -> None:
    folder = f"b/{uuid.uuid4().hex}"
    config = account.configure(folder, privacy={"allowed_regions": None}, **changes)
    if do in (overwrite, report):
        account.copy("a/run", folder)
    policies = build_policies(config)
    policies[role] = without(policies[role], action, sid=sid)
    for each, policy in policies.items():
        account.allow(each, policy)
    with pytest.raises(FruitdaskError, match=message):
        do(config, workers)


# -- EC2

ANY_NETWORK = EC2 | {"subnet_id": None}
EC2_ACTIONS = sorted(
    {need.action for need in list_actions(load(cluster=ANY_NETWORK)) if need.action.startswith("ec2:")}
)


@pytest.fixture(scope="module")
def belongings(account: Account) -> dict[str, str]:
    """An image, an instance, and a security group with a rule."""
    with closing(account.connect("ec2")) as ec2:
        image = ec2.register_image(Name="any")["ImageId"]
        instances = ec2.run_instances(ImageId=image, InstanceType="m6i.large", MinCount=1, MaxCount=1)["Instances"]
        group = ec2.create_security_group(GroupName="any", Description="any")["GroupId"]
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=build_rule(8786))
    return {"image": image, "instance": instances[0]["InstanceId"], "group": group}


def build_rule(port: int) -> list[dict[str, Any]]:
    """Build a rule that lets an address reach a port."""
    return [{"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}]


@pytest.mark.parametrize("action", EC2_ACTIONS)
def test_moto_refuses_without_an_action_on_ec2(account: Account, belongings: dict[str, str], action: str) -> None:
    image, instance, group = belongings.values()
    arguments: dict[str, dict[str, Any]] = {
        "DescribeInstanceTypes": {"InstanceTypes": ["m6i.large"]},
        "RunInstances": {"ImageId": image, "InstanceType": "m6i.large", "MinCount": 1, "MaxCount": 1},
        "CreateTags": {"Resources": [instance], "Tags": [{"Key": "any", "Value": "any"}]},
        "TerminateInstances": {"InstanceIds": [instance]},
        "GetConsoleOutput": {"InstanceId": instance},
        "CreateSecurityGroup": {"GroupName": "another", "Description": "any"},
        "AuthorizeSecurityGroupIngress": {"GroupId": group, "IpPermissions": build_rule(8787)},
        "RevokeSecurityGroupIngress": {"GroupId": group, "IpPermissions": build_rule(8786)},
    }
    name, policy = action.removeprefix("ec2:"), build_policies(load(cluster=ANY_NETWORK))["launcher"]
    with closing(account.connect("ec2", role="launcher")) as ec2:
        ask = functools.partial(getattr(ec2, xform_name(name)), **arguments.get(name, {}))
        account.allow("launcher", without(policy, action))
        with pytest.raises(ClientError, match=f"not authorized to perform: {action}") as refused:
            ask()
        assert "do not allow" in str(aws.explain_aws_error(refused.value))
        account.allow("launcher", policy)
        ask()


def list_questions_on_ec2(action: str, form: dict[str, str]) -> Iterator[Question]:
    """List what EC2 would ask IAM for a request; instances and security groups that are named are fruitdask's own."""
    tags: dict[str, dict[str, str]] = {}
    for field, kind in form.items():
        if specification := re.fullmatch(r"(TagSpecification\.\d+)\.ResourceType", field):
            keys = {one: key for one, key in form.items() if re.fullmatch(specification[1] + r"\.Tag\.\d+\.Key", one)}
            tags[kind] = {f"aws:RequestTag/{key}": form[one[:-3] + "Value"] for one, key in keys.items()}
    here, arn = HERE, "arn:aws:ec2:eu-west-1:123456789012:"
    for kind in tags:
        yield "ec2:CreateTags", f"{arn}{kind}/new", here | tags[kind] | {"ec2:CreateAction": action}
    if action == "RunInstances":
        place = "NetworkInterface.1."
        yield f"ec2:{action}", f"{arn}instance/new", here | tags["instance"] | {
            "ec2:InstanceType": form["InstanceType"]
        }
        yield f"ec2:{action}", f"{arn}volume/new", here | tags["volume"]
        yield f"ec2:{action}", f"arn:aws:ec2:eu-west-1::image/{form['ImageId']}", here
        for kind, name in (("subnet", place + "SubnetId"), ("security-group", place + "SecurityGroupId.1")):
            yield f"ec2:{action}", f"{arn}{kind}/{form[name]}", here
        yield f"ec2:{action}", f"{arn}network-interface/new", here
    elif action == "CreateSecurityGroup":
        yield f"ec2:{action}", f"{arn}security-group/new", here | tags["security-group"]
        yield f"ec2:{action}", f"{arn}vpc/{form['VpcId']}", here
    elif action.endswith("SecurityGroupIngress"):
        yield f"ec2:{action}", f"{arn}security-group/{form['GroupId']}", OWN_GROUP
    elif "InstanceId.1" in form and not action.startswith("Describe"):
        yield f"ec2:{action}", f"{arn}instance/{form['InstanceId.1']}", OWN
    else:
        yield f"ec2:{action}", "*", here


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc")
def test_cluster_asks_ec2_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackEC2() as cloud:
        cloud.use(monkeypatch)
        options = {"region": cloud.region, "n_workers": 1, "client_cidr": "127.0.0.1/32", "docker_image": "any"}
        config = load(cluster={"kind": "ec2"} | options)
        with open_client(config.cluster) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        asked = [call for call in cloud.calls if call.service == "ec2"]
    policy = build_policies(config)["launcher"]
    questions = [
        question
        for call in asked
        for question in list_questions_on_ec2(call.action, dict(re.findall(r"(\S+?)=(\S*)", call.summary)))
    ]
    assert [question for question in questions if not is_allowed(policy, *question)] == []
    assert {action for action in EC2_ACTIONS if action not in {question[0] for question in questions}} == {
        "ec2:GetConsoleOutput"
    }


AZURE = {
    "kind": "azure",
    "location": "westeurope",
    "subscription_id": "0-1",
    "docker_image": "any",
    "identity": "fruit-machines",
    **dict.fromkeys(("resource_group", "vnet", "security_group"), "fruits"),
}


def test_command_prints_roles_of_azure_and_how_to_assign_them(tmp_path: Path) -> None:
    urls = ("--set", "input.url=abfs://photos/in", "--set", "output.url=abfs://results/out")
    found = invoke(tmp_path, *urls, **AZURE)
    roles, scope = json.loads(found.stdout), "/subscriptions/0-1/resourceGroups/fruits"
    assert [role["AssignableScopes"] for role in roles.values()] == [[scope]] * 2
    assert roles["workers"]["Actions"] == [
        "Microsoft.Compute/virtualMachines/delete",
        "Microsoft.Compute/disks/delete",
        "Microsoft.Network/networkInterfaces/delete",
    ]
    assert "Microsoft.Network/publicIPAddresses/write" not in roles["launcher"]["Actions"]
    commands = [line for line in found.stderr.splitlines() if line.startswith("az role ")]
    assert [line.split()[2] for line in commands] == ["definition", "assignment"] * 2 + ["assignment"] * 4
    assert '--role "fruitdask workers in fruits" --assignee-object-id "$(az identity show' in commands[3]
    assert commands[3].endswith(f"--scope {scope}") and '"Storage Blob Data Contributor"' in commands[-1]
    assert json.loads(invoke(tmp_path, "--role", "workers", **AZURE).stdout) == roles["workers"]


def test_command_explains_each_action_on_azure(tmp_path: Path) -> None:
    lines = invoke(tmp_path, "--explain", **AZURE, public_ingress=True).stdout.splitlines()
    assert any(
        re.match(r"launcher: Microsoft.Network/publicIPAddresses/write +creates the public", line) for line in lines
    )
    assert any(
        re.match(r"workers: Microsoft.Compute/virtualMachines/delete +lets a machine delete", line) for line in lines
    )
