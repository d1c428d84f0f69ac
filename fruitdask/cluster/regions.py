"""Regions of images, results and machines: found, and checked against the allowed ones, before reading a byte."""

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from fruitdask.core.aws import find_default_region
from fruitdask.core.config import ClusterConfig, Config
from fruitdask.core.storage import Location, explained, hide_secrets
from fruitdask.errors import ResidencyError, StorageError

#: Used instead of a region: this machine, whose location the user knows, and unknown locations.
LOCAL, UNKNOWN = "local", "unknown"

#: Regions of AWS in the European Union and their places; PRIVACY.md names the sources. London and Zurich are outside.
AWS_EU_REGIONS: Mapping[str, str] = {
    "eu-central-1": "Frankfurt, Germany",
    "eu-north-1": "Stockholm, Sweden",
    "eu-south-1": "Milan, Italy",
    "eu-south-2": "Spain",
    "eu-west-1": "Ireland",
    "eu-west-3": "Paris, France",
    "eusc-de-east-1": "European Sovereign Cloud, Germany",
}
#: The same for AWS and Azure together; Azure's regions in Norway are outside.
EU_REGIONS: Mapping[str, str] = {
    **AWS_EU_REGIONS,
    "austriaeast": "Vienna, Austria",
    "belgiumcentral": "Brussels, Belgium",
    "denmarkeast": "Denmark",
    "francecentral": "Paris, France",
    "francesouth": "Marseille, France",
    "germanynorth": "Berlin, Germany",
    "germanywestcentral": "Frankfurt, Germany",
    "italynorth": "Milan, Italy",
    "northeurope": "Ireland",
    "polandcentral": "Warsaw, Poland",
    "spaincentral": "Madrid, Spain",
    "swedencentral": "Gävle, Sweden",
    "swedensouth": "Sweden",
    "westeurope": "Netherlands",
}

#: Domains of Amazon's servers: its commercial, Chinese and European sovereign clouds.
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu")
_REGION_HEADER = "x-amz-bucket-region"

_Allowed = Literal["eu"] | tuple[str, ...]


@dataclass(frozen=True)
class _Finding:
    """The region of a place; a problem ends any run that restricts regions."""

    place: str
    name: str
    region: str = UNKNOWN
    problem: str = ""
    advice: str = "choose one in an allowed region"


def find_regions(config: Config, *, scheduler: str | None = None) -> dict[str, str]:
    """Find the known regions of everything that a run reads, writes and computes on."""
    return {finding.place: finding.region for finding in _find_all(config, scheduler)}


def check_regions(config: Config, *, scheduler: str | None = None) -> dict[str, str]:
    """Find the regions of a run, and refuse those that ``privacy.allowed_regions`` does not allow."""
    regions = {}
    for finding in _find_all(config, scheduler):
        if config.privacy.allowed_regions is not None:
            _check(finding, config.privacy.allowed_regions)
        regions[finding.place] = finding.region
    return regions


def _find_all(config: Config, scheduler: str | None) -> Iterator[_Finding]:
    """Find where everything is, one place at a time."""
    source = Location(config.input.url, config.input.storage_options)
    yield _find_storage("input", source, config.input.region, key="input.region")
    for place, url in (("manifest", config.input.manifest), ("inventory", config.input.inventory)):
        if url is not None and "://" in url:
            table = Location(url, config.input.storage_options)
            # The declared region of the images applies to a table on the same server.
            yield _find_storage(place, table, config.input.region if _have_same_host(table, source) else None)
    if "://" in config.model.weights:
        weights = Location(config.model.weights, config.model.storage_options)
        yield _find_storage("weights", weights, config.model.region, key="model.region")
    output = Location(config.output.url, config.output.storage_options)
    yield _find_storage("output", output, config.output.region, key="output.region")
    yield _find_cluster(config.cluster, scheduler)


def _check(finding: _Finding, allowed: _Allowed) -> None:
    """Refuse a place that is, or may be, in a region that is not allowed."""
    if finding.problem:
        raise ResidencyError(f"{finding.place}: {finding.problem}")
    names = (allowed,) if isinstance(allowed, str) else allowed
    if finding.region == LOCAL or finding.region in names or ("eu" in names and finding.region in EU_REGIONS):
        return
    shown = ", ".join("eu (the European Union)" if name == "eu" else name for name in names) or "none"
    raise ResidencyError(
        f"{finding.place}: {finding.name} is in {finding.region}, but privacy.allowed_regions has {shown}; "
        f"{finding.advice}, or change privacy.allowed_regions{_suggest_regions(names)}"
    )


def _suggest_regions(names: tuple[str, ...]) -> str:
    """Suggest regions for names that are probably misspelled."""
    import botocore.session

    session, known = botocore.session.Session(), {"eu", *EU_REGIONS}
    for partition in session.get_available_partitions():
        known.update(session.get_available_regions("ec2", partition))
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in names if name not in known}
    return "".join(f"; did you mean {close[0]} instead of {name}?" for name, close in near.items() if close)


def _find_storage(place: str, location: Location, declared: str | None, *, key: str | None = None) -> _Finding:
    """Find where a folder or file is."""
    name, location = hide_secrets(location.url), location.base
    remedy = f"set {key}" if key else "use one on the server of the images, or on this machine"
    unknown = f"privacy.allowed_regions needs the region of {{}}, which is unknown; {remedy}"
    try:
        if location.is_local:
            return _Finding(place, name, declared or LOCAL)
        is_amazon = _is_amazon(location)
        if declared and not is_amazon:
            return _Finding(place, name, declared)
        if not location.is_s3:
            return _Finding(place, name, problem=unknown.format(name))
        bucket = location.fs.split_path(location.path)[0]
        name = f"the bucket {bucket}"
        region = _ask_bucket(location, bucket, is_amazon=is_amazon)
    except StorageError as error:
        return _Finding(place, name, problem=f"{error}; privacy.allowed_regions needs to know the region")
    if region is None:
        return _Finding(place, name, problem=unknown.format(name))
    if is_amazon:
        differs = declared and key and region != declared
        problem = f"{name} is in {region}, not in {declared} as {key} says; correct {key}" if differs else ""
        return _Finding(place, name, region, problem=problem)
    return _Finding(
        place, name, region, advice=f"choose one in an allowed region, or {remedy} if its server reports a wrong region"
    )


def _have_same_host(one: Location, other: Location) -> bool:
    """Whether two places are on the same server, or in the same bucket."""
    one, other = one.base, other.base
    return one.fs is other.fs and (one.is_s3 or one.is_azure or urlsplit(one.url).netloc == urlsplit(other.url).netloc)


def _is_amazon(location: Location) -> bool:
    """Whether it is on one of Amazon's servers, which report their regions reliably."""
    if not location.is_s3:
        return False
    with explained(location, "find the region of"):
        host = urlsplit(location.fs.s3.meta.endpoint_url).hostname or ""
    return host.endswith(_AMAZON)


def _ask_bucket(location: Location, bucket: str, *, is_amazon: bool) -> str | None:
    """Ask for the region of a bucket, with the client that will read or write it."""
    fs = location.fs
    with explained(location, "find the region of"):
        region = _head_bucket(fs, bucket).get(_REGION_HEADER)
        if not region:
            constraint = fs.call_s3("get_bucket_location", Bucket=bucket).get("LocationConstraint")
            # Amazon's oldest buckets: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetBucketLocation.html
            region = {"EU": "eu-west-1", None: "us-east-1"}.get(constraint, constraint) if is_amazon else constraint
    return region or None


def _head_bucket(fs: Any, bucket: str) -> Mapping[str, str]:
    """Get the headers of a server's response about a bucket; Amazon names the region even if it denies access."""
    try:
        response: Any = fs.call_s3("head_bucket", Bucket=bucket)
    except Exception as error:
        # s3fs raises its own errors from those of botocore, and only the latter have the headers.
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    headers: Mapping[str, str] = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers


def _find_cluster(cluster: ClusterConfig, scheduler: str | None) -> _Finding:
    """Find where the cluster is."""
    if cluster.kind == "ec2" and scheduler is None:
        return _find_ec2(cluster.region or find_default_region(), cluster.availability_zone)
    if cluster.kind == "azure" and scheduler is None:
        return _Finding("cluster", "the cluster on Azure", cluster.location)
    if cluster.kind == "custom" and scheduler is None:
        problem = f"privacy.allowed_regions needs the region of {cluster.name}, which is unknown; add cluster.region"
        return _Finding("cluster", cluster.name, cluster.region or UNKNOWN, problem="" if cluster.region else problem)
    address = scheduler or (cluster.address if cluster.kind == "address" else None)
    region = cluster.region if cluster.kind == "address" else None
    if address is None or (region is None and is_loopback(address)):
        return _Finding("cluster", "this machine", LOCAL)
    name = f"the cluster at {address}"
    problem = f"privacy.allowed_regions needs the region of {name}, which is unknown; add cluster.region"
    if cluster.kind != "address":
        problem += " to a cluster of kind: address"
    return _Finding("cluster", name, region or UNKNOWN, problem="" if region else problem)


def _find_ec2(region: str | None, zones: str | list[str] | None) -> _Finding:
    """Find where instances will be: a Local or Wavelength Zone may be in another country than its region."""
    name = "the cluster on EC2"
    if region is None:
        return _Finding("cluster", name, problem=f"no region is set for {name}; add cluster.region")
    for zone in [zones] if isinstance(zones, str) else zones or []:
        if not re.fullmatch(rf"{re.escape(region)}[a-z]", zone):
            problem = (
                f"expected cluster.availability_zone to name a zone of {region} such as {region}a, found {zone}, "
                "which may be in another country; choose another zone"
            )
            return _Finding("cluster", name, region, problem=problem)
    return _Finding("cluster", name, region)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a Dask scheduler.

    >>> is_loopback("tcp://127.0.0.1:8786"), is_loopback("localhost:8786"), is_loopback("tls://10.0.0.5:8786")
    (True, True, False)
    """
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    try:
        return parts.scheme == "inproc" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"
