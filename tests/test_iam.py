"""Policies are sufficient and minimal, by AWS's own data, by a moto server that enforces them, and by AWS's rules.

Limits of moto's enforcement (5.2): it checks actions, and resources of S3, but neither resources of EC2, nor tags
given at launch, nor the role that is passed. It assumes that every condition is met, even in a Deny statement, which
then forbids everything. It requires ``s3:HeadBucket`` where S3 requires ``s3:ListBucket``, and DeleteObject on the
bucket where many objects are deleted at once. It reports a missing object even to a role that may not list. `loosen`
adapts policies to that. For the rest, `is_allowed` judges the requests to moto by AWS's documented rules, and
`test_cluster_ec2.py` the requests to the loopback EC2.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore import xform_name
from botocore.exceptions import ClientError
from click.testing import CliRunner
from distributed import Client
from hypothesis import given, settings, strategies
from iam_rules import HERE, OWN, OWN_GROUP, Context, Policy, Question, is_allowed
from runs import OFF
from s3fs import S3FileSystem

import fruitdask
from fruitdask.cli import cli
from fruitdask.cluster import open_client
from fruitdask.cluster.ec2.policies import ROLES, Permission, Role, build_policies, list_actions
from fruitdask.cluster.regions import AWS_EU_REGIONS, EU_REGIONS
from fruitdask.core import aws
from fruitdask.core.config import Config, LocalClusterConfig, ModelConfig
from fruitdask.core.sample import draw_sample
from fruitdask.core.storage import Location, hash_file
from fruitdask.errors import ConfigError, FruitdaskError, StorageError

pytestmark = pytest.mark.cloud

#: File systems of this module: s3fs caches them by their options, which do not include keys and servers of the
#: environment.
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
    """Keep the developer's own AWS region out of the policies."""
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")


def load(**sections: Any) -> Config:
    """Load a configuration on S3 with some sections replaced."""
    places = {"input": {"url": "s3://photos/set/fruits"}, "output": {"url": "s3://results/a/run"}}
    return fruitdask.load_config(places | sections)


def without(policy: Policy, action: str, *, sid: str | None = None) -> Policy:
    """Remove an action from a policy, or from one of its statements."""
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


@functools.cache
def load_actions() -> dict[str, Any]:
    """Load AWS's list of its actions, as cfn-lint ships it; the import takes half a second."""
    from cfnlint.data import AdditionalSpecs
    from cfnlint.helpers import load_resource

    return load_resource(AdditionalSpecs, "Policies.json")


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
                has_resources = "Resources" in load_actions()[service]["Actions"][name.lower()]
                assert ("*" in part["Resource"]) is not has_resources
                # EC2 scopes by region what it cannot scope by resource.
                assert has_resources or "aws:RequestedRegion" in part["Condition"]["StringEquals"]


def test_policies_pass_cfn_lint() -> None:
    from cfnlint.api import lint
    from cfnlint.config import ManualArgs

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
    # A mistake in each of three statements shows that the linter checks policies at all.
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


def test_policies_are_below_the_size_limit_of_iam() -> None:
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
def test_policies_use_the_partition_of_the_region(region: str) -> None:
    config = load(cluster=EC2 | {"region": region})
    partition = botocore.session.Session().get_partition_for_region(region)
    arns = [arn for need in list_actions(config) for arn in need.resources if arn != "*"]
    assert {arn.split(":")[1] for arn in arns} == {partition}


def test_list_of_eu_regions_matches_botocore() -> None:
    session = botocore.session.Session()
    known = {region for part in ("aws", "aws-eusc") for region in session.get_available_regions("ec2", part)}
    assert known & set(EU_REGIONS) == set(AWS_EU_REGIONS)


def test_public_and_local_places_need_no_permission() -> None:
    config = load(input={"url": "s3://open/fruits", "storage_options": {"anon": True}}, output={"url": "/tmp/run"})
    assert list_actions(config) == []
    assert build_policies(config)["workers"]["Statement"] == []


def test_cluster_on_ec2_needs_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(cluster=EC2 | {"region": None})
    with pytest.raises(ConfigError, match="no AWS region is set for the cluster; give cluster.region"):
        build_policies(config)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert "arn:aws:ec2:eu-west-3:*:instance/*" in {arn for need in list_actions(config) for arn in need.resources}


LAUNCH = HERE | {"aws:RequestTag/fruitdask:run": "r1", "ec2:InstanceType": "m6i.large"}
AT_LAUNCH = HERE | {"ec2:CreateAction": "RunInstances"}
INSTANCE = "arn:aws:ec2:eu-west-1:123456789012:instance/i-1"
VOLUME = "arn:aws:ec2:eu-west-1:123456789012:volume/vol-1"
GROUP = "arn:aws:ec2:eu-west-1:123456789012:security-group/sg-1"
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
def test_launcher_may_do_only_what_it_needs(expected: bool, action: str, resource: str, context: Context) -> None:
    policies = build_policies(load(cluster=EC2, privacy={"allowed_regions": "eu"}))
    assert is_allowed(policies["launcher"], action, resource, context) is expected
    assert not action.startswith(("ec2", "iam")) or not is_allowed(policies["workers"], action, resource, context)


def test_wildcards_in_names_are_escaped() -> None:
    policy = build_policies(load(input={"url": "s3://photos/a*b?"}))["workers"]
    assert is_allowed(policy, "s3:GetObject", f"{PHOTOS}/a*b?/1.jpg", {})
    assert not is_allowed(policy, "s3:GetObject", f"{PHOTOS}/axbx/1.jpg", {})


def test_given_security_groups_are_neither_created_nor_changed() -> None:
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


def test_command_states_its_assumptions(tmp_path: Path) -> None:
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

#: A moto server in a process of its own, because enforcement holds for a whole process. It logs the requests to S3 in a
#: file, and, as `conftest.py` does, it reads descriptions of services and lists its modules only once.
_SERVER = r"""
import functools, io, json, re, sys
import moto.backends
from botocore.loaders import JSONFileLoader
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
application_of_moto, log = DomainDispatcherApplication(create_backend_app), open(sys.argv[1], "a")
read, modules = functools.cache(JSONFileLoader().load_file), tuple(moto.backends.list_of_moto_modules())
JSONFileLoader.load_file = lambda self, path: read(path)
moto.backends.list_of_moto_modules = lambda: modules
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
    return application_of_moto(environ, begin)
server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
_ADMIN = {"Version": "2012-10-17", "Statement": [{"Sid": "All", "Effect": "Allow", "Action": ["*"], "Resource": ["*"]}]}


def loosen(policy: Policy) -> Policy:
    """Allow what only moto requires, and remove what moto does not understand."""
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
    """List the questions that S3 would ask IAM about a request: caller, action, resource and context."""
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
    """An account of moto with a launcher and workers that may do what their policies allow."""

    url: str
    log: Path
    keys: dict[str, dict[str, str]]
    clients: dict[tuple[str, str], Any] = field(default_factory=dict)

    def connect(self, service: str, *, role: str = "admin") -> Any:
        """Return the client of a role, by default of the administrator; each is made once."""
        if (service, role) not in self.clients:
            session = boto3.Session(**self.keys[role], region_name="eu-west-1")
            self.clients[service, role] = session.client(service, endpoint_url=self.url)
        return self.clients[service, role]

    def close(self) -> None:
        """Close all clients."""
        for client in self.clients.values():
            client.close()

    def allow(self, role: str, policy: Policy) -> None:
        """Give a role its policy."""
        document = json.dumps(loosen(policy))
        self.connect("iam").put_user_policy(UserName=role, PolicyName="fruitdask", PolicyDocument=document)

    def list_questions(self, role: str) -> list[Question]:
        """List the questions that S3 would have asked about a role so far."""
        found = (question for line in self.log.read_text().splitlines() for question in list_questions(line))
        return [question for caller, question in found if caller == self.keys[role]["aws_access_key_id"]]

    def copy(self, source: str, target: str) -> None:
        """Copy results."""
        s3 = self.connect("s3")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="results", Prefix=f"{source}/")
        for name in [entry["Key"] for page in pages for entry in page["Contents"]]:
            s3.copy_object(Bucket="results", Key=name.replace(source, target, 1), CopySource=f"results/{name}")

    def configure(self, folder: str, /, **changes: Any) -> Config:
        """Configure a run that keeps everything it can on S3."""
        sections: dict[str, Any] = {
            "input": {"url": "s3://photos/set/fruits", "manifest": "s3://lists/all.csv"},
            "model": {"weights": "s3://nets/colours.keras", "preprocessing": "none"},
            "featurize": {"images_per_partition": 4, "fetch_attempts": 1, "max_failed_fraction": 0.5},
            "explore": {"input_px": 32, "max_thumbnails": 4},
            "plots": {"enabled": False},
            "privacy": {"allowed_regions": ["eu-west-1"]},
            "output": {"url": f"s3://results/{folder}"},
        }
        names = [*sections, *(name for name in changes if name not in sections)]
        return fruitdask.load_config({name: sections.get(name, {}) | changes.get(name, {}) for name in names})


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> Iterator[Account]:
    """Start an account that enforces policies, with images (four broken, one missing), labels, a network, and a bucket
    for results.
    """
    log = tmp_path_factory.mktemp("moto") / "requests"
    environment = os.environ | {"MOTO_EC2_LOAD_DEFAULT_AMIS": "false", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", _SERVER, str(log)]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment
    ) as server:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Popen waits for the process, so it must end whatever happens here.
        with ExitStack() as stack:
            stack.callback(server.terminate)
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            anybody = {"aws_access_key_id": "first", "aws_secret_access_key": "first"}
            account = Account(url, log, {"anybody": anybody})
            stack.callback(account.close)
            iam = account.connect("iam", role="anybody")
            account.keys |= {role: create_user(iam, role) for role in ("admin", *ROLES)}
            fill_buckets(account, tmp_path_factory.mktemp("images"), Path(tiny_model.weights))
            enforce = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
            urllib.request.urlopen(enforce).close()
            yield account


def create_user(iam: Any, name: str) -> dict[str, str]:
    """Create a user with all permissions for now, and return their keys."""
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="fruitdask", PolicyDocument=json.dumps(_ADMIN))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}


def fill_buckets(account: Account, folder: Path, network: Path) -> None:
    """Upload images, their labels and a network."""
    draw_sample(folder, per_class=2, size_px=32)
    (folder / "broken").mkdir()
    for number in range(4):
        (folder / "broken" / f"{number}.jpg").write_text("no image")
    images = [path for path in folder.rglob("*") if path.is_file()]
    listed = ["path,label", "gone/1.jpg,gone"] + [f"{path.relative_to(folder)},{path.parent.name}" for path in images]
    s3 = account.connect("s3")
    for bucket in ("photos", "lists", "nets", "results"):
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    for path in images:
        s3.put_object(Bucket="photos", Key=f"set/fruits/{path.relative_to(folder)}", Body=path.read_bytes())
    s3.put_object(Bucket="lists", Key="all.csv", Body="\n".join(listed).encode())
    s3.put_object(Bucket="nets", Key="colours.keras", Body=network.read_bytes())


@pytest.fixture(scope="module")
def workers(account: Account) -> Iterator[Client]:
    """Start a cluster whose client has the launcher's keys and whose worker has the workers'."""
    environments = {role: {name.upper(): key for name, key in account.keys[role].items()} for role in ROLES}
    here = {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_ENDPOINT_URL": account.url}
    local = LocalClusterConfig(n_workers=1, threads_per_worker=2, dashboard_address=None)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in (here | environments["workers"]).items():
            patch.setenv(name, value)
        patch.setattr(S3FileSystem, "_cache", FILE_SYSTEMS)
        with open_client(local) as client:
            # The worker keeps the keys with which it has started.
            for name, key in environments["launcher"].items():
                patch.setenv(name, key)
            yield client


#: The policies of each configuration, and the requests of the roles under it.
History = list[tuple[dict[Role, Policy], dict[str, list[Question]]]]


@pytest.fixture(scope="module")
def history(account: Account, workers: Client) -> History:
    """Use every command that touches S3, with roles that have only the permissions of their policies."""
    config, anew = account.configure("a/run"), account.configure("a/run", output={"overwrite": True})
    # One run and the page send the requests of all parts of a run.
    brief = account.configure("a/run", **dict.fromkeys(("quality", "check", "report"), OFF))
    history: History = []
    with note_questions(account, config, history):
        fruitdask.explore(brief, client=workers)
        by_status = fruitdask.run(anew, client=workers).manifest["counts"]["by_status"]
        assert by_status == {"ok": 12, "unreadable": 4, "missing": 1}
        # An image that vanishes after the listing is still requested.
        vanished = Location(f"{config.input.url}/gone/2.jpg", config.input.storage_options)
        assert isinstance(workers.submit(hash_file, vanished).exception(), StorageError)
        assert fruitdask.run(config, client=workers).n_computed == 0
        # This deletes the commit mark of a partition, and reads it once more.
        assert fruitdask.run(brief, client=workers, retry_failed=True).n_computed == 5
        assert "</html>" in fruitdask.render_report(config).read()
        assert fruitdask.erase(brief, ["broken/0.jpg"], client=workers).n_erased == 1
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
    """Allow roles what a configuration's policies say, and record their requests meanwhile."""
    before = {role: len(account.list_questions(role)) for role in ROLES}
    policies = build_policies(config)
    for role, policy in policies.items():
        account.allow(role, policy)
    yield
    history.append((policies, {role: account.list_questions(role)[before[role] :] for role in ROLES}))


@pytest.mark.slow
def test_policies_suffice(history: History) -> None:
    asked = {role: {question[0] for question in history[0][1][role]} for role in ROLES}
    assert asked["launcher"] - asked["workers"] == {"s3:GetBucketVersioning"}
    for policies, questions in history:
        for role, policy in policies.items():
            refused = [question for question in questions[role] if not is_allowed(policy, *question)]
            assert refused == []


@pytest.mark.slow
@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.role}-{need.statement}-{need.action}")
def test_each_action_on_s3_is_requested(history: History, need: Permission) -> None:
    if need.action == "s3:AbortMultipartUpload":
        pytest.skip("s3fs uploads in parts only files above 100 MB, and aborts such an upload when a part fails")
    assert any(
        not is_allowed(without(policies[need.role], need.action, sid=need.statement), *question)
        for policies, questions in history
        for question in questions[need.role]
    )


def explore(config: Config, client: Client) -> None:
    """Explore again from the beginning."""
    fruitdask.explore(config, client=client)


def run(config: Config, client: Client) -> None:
    """Run."""
    fruitdask.run(config, client=client)


def overwrite(config: Config, client: Client) -> None:
    """Explore, and overwrite an earlier run."""
    output = config.output.model_copy(update={"overwrite": True})
    fruitdask.explore(config.model_copy(update={"output": output}), client=client)


def report(config: Config, client: Client) -> None:
    """Draw again."""
    fruitdask.render_report(config)


LISTS = pytest.mark.skip(reason="moto reports a missing object even to a role that may not list")
PARTS = pytest.mark.skip(reason="s3fs uploads in parts only files above 100 MB")
DELETES = pytest.mark.skip(reason="s3fs ignores a refused deletion, and Zarr assumes that it was done")
ASKS = pytest.mark.skip(reason="without this permission a run assumes that there are no versions")
NONE = {"input": {"url": "s3://photos/none", "manifest": None}}


def name_case(part: Any) -> str:
    """Name a case by its one-word parts."""
    return part.__name__ if callable(part) else part if isinstance(part, str) and " " not in part else ""


#: How a command fails without an action of a statement.
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
    """Create an image, an instance, and a security group with a rule."""
    ec2 = account.connect("ec2")
    image = ec2.register_image(Name="any")["ImageId"]
    instances = ec2.run_instances(ImageId=image, InstanceType="m6i.large", MinCount=1, MaxCount=1)["Instances"]
    group = ec2.create_security_group(GroupName="any", Description="any")["GroupId"]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=build_rule(8786))
    return {"image": image, "instance": instances[0]["InstanceId"], "group": group}


def build_rule(port: int) -> list[dict[str, Any]]:
    """Build a rule that admits an address to a port."""
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
    call = getattr(account.connect("ec2", role="launcher"), xform_name(name))
    ask = functools.partial(call, **arguments.get(name, {}))
    account.allow("launcher", without(policy, action))
    with pytest.raises(ClientError, match=f"not authorized to perform: {action}") as refused:
        ask()
    assert "do not allow" in str(aws.explain_aws_error(refused.value))
    account.allow("launcher", policy)
    ask()


AZURE = {
    "kind": "azure",
    "location": "westeurope",
    "subscription_id": "0-1",
    "docker_image": "any",
    "identity": "fruit-machines",
    **dict.fromkeys(("resource_group", "vnet", "security_group"), "fruits"),
}


def test_command_prints_azure_roles_and_how_to_assign_them(tmp_path: Path) -> None:
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
