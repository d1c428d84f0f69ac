"""AWS's documented rules of IAM: what EC2 asks about a request, and whether a policy allows it."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

Policy = dict[str, Any]
Context = Mapping[str, str | list[str]]
Question = tuple[str, str, Context]

#: Contexts of requests in a region, about an instance of the run, and about the security group of fruitdask.
HERE = {"aws:RequestedRegion": "eu-west-1"}
OWN = HERE | {"ec2:ResourceTag/fruitdask:run": "r1"}
OWN_GROUP = HERE | {"ec2:ResourceTag/fruitdask": "cluster"}


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile an IAM pattern, in which ``${*}`` means a literal star."""
    parts = re.split(r"(\$\{[*?$]\}|[*?])", pattern)
    words = {"*": ".*", "?": "."}
    return re.compile("".join(words.get(part) or re.escape(part[2] if part[:2] == "${" else part) for part in parts))


def match(pattern: str, text: str) -> bool:
    """Match a text with a pattern."""
    return compile_pattern(pattern).fullmatch(text) is not None


def holds(operator: str, expected: str | list[str], found: str | list[str] | None) -> bool:
    """Return whether a condition holds for the values of a key; None if the request has no such key."""
    quantifier, _, test = operator.rpartition(":")
    if found is None:
        return quantifier == "ForAllValues" or test.endswith("IfExists") or test.startswith("StringNot")
    patterns, values = ([part] if isinstance(part, str) else part for part in (expected, found))
    fits = [any(match(one, value) if "Like" in test else one == value for one in patterns) for value in values]
    if test.startswith("StringNot"):
        return not any(fits)
    return any(fits) if quantifier == "ForAnyValue" else all(fits)


def concerns(statement: dict[str, Any], action: str, resource: str, context: Context) -> bool:
    """Return whether a statement is about a request."""
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


def list_questions_on_ec2(action: str, form: dict[str, str]) -> Iterator[Question]:
    """List the questions that EC2 asks IAM about a request; named instances and security groups are fruitdask's own."""
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
