"""Where buckets and clusters are, according to a real S3 server that records its requests; a proxy sends requests for
Amazon's host names to it.
"""

import copy
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from click.testing import CliRunner
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from PIL import Image
from werkzeug.serving import make_server

import fruitdask
from fruitdask import store
from fruitdask.cli import cli
from fruitdask.cluster.regions import EU_REGIONS, check_regions, find_regions
from fruitdask.core.config import Config
from fruitdask.core.storage import Location
from fruitdask.errors import ResidencyError
from fruitdask.pipeline.record import describe_processing

#: Buckets by region. Requests for these names go to a proxy, never to Amazon's servers.
PARIS, VIRGINIA, LONDON = "photographs-paris", "photographs-virginia", "photographs-london"
REGIONS = {PARIS: "eu-west-3", VIRGINIA: "us-east-1", LONDON: "eu-west-2"}
#: An exploration of small pictures without figures.
SMALL = {"explore": {"input_px": 32}, "plots": {"enabled": False}}
AMAZON = {"endpoint_url": "http://s3.eu-west-3.amazonaws.com"}
AZURE = {"kind": "azure", **dict.fromkeys(("docker_image", "resource_group", "vnet", "security_group"), "i")}

MakeConfig = Callable[..., Config]


class QuietHandler(MotoRequestHandler):
    """Handler that does not print each request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Print nothing."""


class Server:
    """An S3 server that records requests, and can withhold regions that moto would report.

    ``head_status`` is what it answers to HeadBucket, ``location`` what it answers to GetBucketLocation; ``is_silent``
    servers leave the region out of headers.
    """

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=QuietHandler)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.reset()

    def reset(self) -> None:
        """Forget all requests, and answer as moto does."""
        self.requests: list[str] = []
        self.head_status: str | None = None
        self.location: str | None = None
        self.is_silent = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        method, query = environ["REQUEST_METHOD"], environ["QUERY_STRING"]
        self.requests.append(f"{method} {environ['HTTP_HOST']}{environ['PATH_INFO']}{'?' + query if query else ''}")
        if self.location is not None and query == "location":
            start_response("200 OK", [("Content-Type", "application/xml")])
            return [f"<LocationConstraint>{self.location}</LocationConstraint>".encode()]

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            if self.is_silent:
                headers = [header for header in headers if header[0].lower() != "x-amz-bucket-region"]
            return start_response((method == "HEAD" and self.head_status) or status, headers, *rest)

        return self._moto(environ, start)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def running_server(s3_server: str) -> Iterator[Server]:
    """The server, with a photograph in each bucket."""
    server = Server()
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(picture, "JPEG")
    for name, region in REGIONS.items():
        client = boto3.client("s3", endpoint_url=server.url, region_name=region)
        place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        client.create_bucket(Bucket=name, **place)
        client.put_object(Bucket=name, Key="in/apple/0.jpg", Body=picture.getvalue())
        client.close()
    yield server
    server.close()


@pytest.fixture
def server(running_server: Server) -> Server:
    """The server, without recorded requests."""
    running_server.reset()
    return running_server


@pytest.fixture
def amazon(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same server, which answers in place of all servers outside of this machine."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return server


@pytest.fixture
def make_config(server: Server, tmp_path: Path) -> MakeConfig:
    """Make a configuration by its sections; what is not given is local."""

    def make(allowed: Any = "eu", **sections: Any) -> Config:
        url = sections.get("input", {}).get("url", "")
        options = {"storage_options": {"endpoint_url": server.url}} if url.startswith("s3") else {}
        tree = {
            "input": {"url": str(tmp_path / "in")} | options | sections.pop("input", {}),
            "output": {"url": str(tmp_path / "out")} | sections.pop("output", {}),
            "privacy": {"allowed_regions": allowed},
        }
        return fruitdask.load_config(tree | sections)

    return make


def test_eu_regions_are_those_that_amazon_places_there() -> None:
    partitions = botocore.session.Session().get_component("data_loader").load_data("partitions")["partitions"]
    places = {name: region["description"] for each in partitions for name, region in each["regions"].items()}
    european = {name for name, place in places.items() if place.startswith(("Europe", "AWS European"))}
    outside = {name for name in european if places[name] in ("Europe (London)", "Europe (Zurich)")}
    assert len(outside) == 2
    assert european - outside == {name for name in EU_REGIONS if "-" in name}


def test_privacy_md_spells_the_regions_out() -> None:
    text = (Path(__file__).parents[1] / "PRIVACY.md").read_text(encoding="utf-8")
    assert [name for name in EU_REGIONS if f"`{name}`" not in text] == []


def test_find_regions_requests_buckets_but_nothing_in_them(make_config: MakeConfig, server: Server) -> None:
    options = {"storage_options": {"endpoint_url": server.url}}
    config = make_config(
        input={"url": f"s3://{PARIS}/in", "manifest": f"s3://{LONDON}/list.csv"},
        model={"weights": f"s3://{LONDON}/network.h5"} | options,
        output={"url": f"s3://{VIRGINIA}/out"} | options,
    )
    assert find_regions(config) == {
        "input": "eu-west-3",
        "manifest": "eu-west-2",
        "weights": "eu-west-2",
        "output": "us-east-1",
        "cluster": "local",
    }
    host = server.url.removeprefix("http://")
    assert server.requests == [f"HEAD {host}/{bucket}" for bucket in (PARIS, LONDON, LONDON, VIRGINIA)]


def test_find_regions_of_this_machine(make_config: MakeConfig) -> None:
    assert find_regions(make_config()) == {"input": "local", "output": "local", "cluster": "local"}
    mounted = make_config(input={"url": "/mnt/share", "region": "us-east-1"})
    with pytest.raises(ResidencyError, match="^input: /mnt/share is in us-east-1, but .*regions has eu"):
        check_regions(mounted)


@pytest.mark.parametrize("command", ["run", "explore"])
def test_bucket_elsewhere_is_refused_before_a_byte_is_read(server: Server, tmp_path: Path, command: str) -> None:
    options = {"endpoint_url": server.url}
    sections = {
        "input": {"url": f"s3://{VIRGINIA}/in", "storage_options": options},
        "privacy": {"allowed_regions": "eu"},
        "output": {"url": f"s3://{PARIS}/out", "storage_options": options},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    result = CliRunner().invoke(cli, [command, str(tmp_path / "run.yaml")])
    assert result.exit_code == 4, result.output
    assert result.stderr.strip().splitlines()[-1] == (
        f"fruitdask: input: the bucket {VIRGINIA} is in us-east-1, but privacy.allowed_regions has eu (the European "
        "Union); choose one in an allowed region, or set input.region if its server reports a wrong region, or change "
        "privacy.allowed_regions"
    )
    assert server.requests == [f"HEAD {server.url.removeprefix('http://')}/{VIRGINIA}"]


@pytest.mark.parametrize("part", ["output", "manifest", "inventory", "weights"])
def test_every_bucket_is_checked(make_config: MakeConfig, server: Server, part: str) -> None:
    options, url = {"storage_options": {"endpoint_url": server.url}}, f"s3://{VIRGINIA}/there.h5"
    sections: dict[str, Any] = {
        "output": {"output": {"url": url} | options},
        "manifest": {"input": {"url": f"s3://{PARIS}/in", "manifest": url}},
        "inventory": {"input": {"url": f"s3://{PARIS}/in", "inventory": url}},
        "weights": {"model": {"weights": url} | options},
    }[part]
    with pytest.raises(ResidencyError, match=f"^{part}: the bucket {VIRGINIA} is in us-east-1"):
        check_regions(make_config(**sections))


@pytest.mark.parametrize("denial", ["403 Forbidden", "400 Bad Request"])
def test_region_is_found_where_everything_else_is_denied(make_config: MakeConfig, server: Server, denial: str) -> None:
    server.head_status = denial
    assert check_regions(make_config(input={"url": f"s3://{PARIS}/in"}))["input"] == "eu-west-3"
    assert {request.split()[0] for request in server.requests} == {"HEAD"}


@pytest.mark.parametrize(
    ("declared", "is_silent", "location", "expected"),
    [
        ("eu-west-3", False, None, "eu-west-3"),
        ("westeurope", True, "", "westeurope"),
        (None, True, "eu-north-1", "eu-north-1"),
        (None, False, "eu-north-1", "us-east-1"),
    ],
    ids=["declared, whatever it says", "declared, says nothing", "location", "header before location"],
)
def test_other_servers_are_where_the_configuration_says(
    make_config: MakeConfig,
    server: Server,
    declared: str | None,
    is_silent: bool,
    location: str | None,
    expected: str,
) -> None:
    server.is_silent, server.location = is_silent, location
    config = make_config([expected], input={"url": f"s3://{VIRGINIA}/in", "region": declared})
    assert check_regions(config)["input"] == expected == find_regions(config)["input"]
    assert (server.requests == []) == (declared is not None)


def test_server_that_says_nothing_is_refused(make_config: MakeConfig, server: Server) -> None:
    server.is_silent = True
    config = make_config(input={"url": f"s3://{VIRGINIA}/in"})
    needed = f"privacy.allowed_regions needs the region of the bucket {VIRGINIA}, which is unknown"
    sentence = f"^input: {needed}; set input.region$"
    with pytest.raises(ResidencyError, match=sentence):
        check_regions(config)
    assert find_regions(config)["input"] == "unknown"


@pytest.mark.parametrize(
    ("bucket", "declared", "problem"),
    [
        (PARIS, None, None),
        (PARIS, "eu-west-3", None),
        (PARIS, "eu-west-1", f"the bucket {PARIS} is in eu-west-3, not in eu-west-1 as input.region says; correct"),
        (VIRGINIA, "eu-west-3", f"the bucket {VIRGINIA} is in us-east-1, not in eu-west-3"),
        (VIRGINIA, None, f"the bucket {VIRGINIA} is in us-east-1, but .*; choose one in an allowed region, or"),
        (LONDON, None, f"the bucket {LONDON} is in eu-west-2, but privacy.allowed_regions has eu"),
    ],
    ids=["found", "found as declared", "declared otherwise", "declared to be allowed", "elsewhere", "London"],
)
def test_amazons_answer_overrides_the_configuration(
    make_config: MakeConfig, amazon: Server, bucket: str, declared: str | None, problem: str | None
) -> None:
    config = make_config(input={"url": f"s3://{bucket}/in", "region": declared, "storage_options": AMAZON})
    if problem is None:
        assert check_regions(config)["input"] == REGIONS[bucket]
    else:
        with pytest.raises(ResidencyError, match=f"^input: {problem}"):
            check_regions(config)
    assert amazon.requests == [f"HEAD s3.eu-west-3.amazonaws.com/{bucket}"]


@pytest.mark.parametrize(("location", "expected"), [("", "us-east-1"), ("EU", "eu-west-1"), ("eu-west-3", "eu-west-3")])
def test_amazon_without_a_header_is_asked_for_the_location(
    make_config: MakeConfig, amazon: Server, location: str, expected: str
) -> None:
    amazon.is_silent, amazon.location = True, location
    config = make_config([expected], input={"url": f"s3://{VIRGINIA}/in", "storage_options": AMAZON})
    assert check_regions(config)["input"] == expected
    assert [request.split()[0] for request in amazon.requests] == ["HEAD", "GET"]


def test_manifest_in_another_bucket_of_amazon_may_be_in_another_region(make_config: MakeConfig, amazon: Server) -> None:
    source = {"url": f"s3://{PARIS}/in", "region": "eu-west-3", "storage_options": AMAZON}
    config = make_config(["eu", "eu-west-2"], input=source | {"manifest": f"s3://{LONDON}/list.csv"})
    assert check_regions(config)["manifest"] == "eu-west-2"


@pytest.mark.parametrize("way", ["client_kwargs", "environment", "profile"])
def test_region_is_requested_from_the_server_that_holds_the_images(
    make_config: MakeConfig, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    options: dict[str, Any] = {"default_block_size": 1_000_000 + len(way)}  # makes s3fs create another client
    if way == "client_kwargs":
        options["client_kwargs"] = {"endpoint_url": server.url, "region_name": "eu-central-1"}
    elif way == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    else:
        (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-3\nendpoint_url = {server.url}\n")
        (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        options["profile"] = "lab"
    config = make_config(input={"url": f"s3://{PARIS}/in", "storage_options": options})
    assert check_regions(config)["input"] == "eu-west-3"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"profile": "nobody"}, r"cannot find the region of s3://fruits/in: The config profile \(nobody\) could not"),
        ({}, "cannot find the region of s3://fruits/in: .*(bucket does not exist|NoSuchBucket|no such bucket)"),
    ],
    ids=["profile", "no such bucket"],
)
def test_bucket_that_cannot_be_asked_is_refused(
    make_config: MakeConfig, server: Server, options: dict[str, str], problem: str
) -> None:
    source = {"url": "s3://fruits/in", "storage_options": {"endpoint_url": server.url} | options}
    config = make_config(input=source)
    with pytest.raises(ResidencyError, match=f"^input: {problem}.*regions needs to know the region$"):
        check_regions(config)
    assert find_regions(config)["input"] == "unknown"


@pytest.mark.parametrize("url", ["https://me:secret@example.org/fruits?sig=secret", "memory://fruits"])
def test_other_protocols_need_a_declared_region(make_config: MakeConfig, url: str) -> None:
    with pytest.raises(ResidencyError, match="^input: .*which is unknown; set input.region$") as caught:
        check_regions(make_config(input={"url": url}))
    assert "secret" not in str(caught.value)
    assert check_regions(make_config(input={"url": url, "region": "westeurope"}))["input"] == "westeurope"


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({"kind": "local"}, "local"),
        ({"address": "tcp://127.0.0.1:8786"}, "local"),
        ({"address": "localhost:8786"}, "local"),
        ({"address": "tls://10.0.0.5:8786", "region": "eu-west-3"}, "eu-west-3"),
        ({"kind": "ec2", "docker_image": "i", "region": "eu-west-3", "availability_zone": "eu-west-3b"}, "eu-west-3"),
        ({"kind": "ec2", "docker_image": "i"}, "eu-south-2"),
        ({**AZURE, "location": "West Europe"}, "westeurope"),
        ({"class": "dask_jobqueue.SLURMCluster", "n_workers": 1, "region": "francecentral"}, "francecentral"),
    ],
    ids=["local", "loopback", "localhost", "declared", "ec2", "ec2, environment", "azure", "custom"],
)
def test_cluster_that_is_allowed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], expected: str
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-south-2")
    assert check_regions(make_config(cluster=cluster))["cluster"] == expected


@pytest.mark.parametrize(
    ("cluster", "problem"),
    [
        (
            {"address": "tls://10.0.0.5:8786"},
            ".* the region of the cluster at tls://10.0.0.5:8786, which is unknown; add cluster.region$",
        ),
        (
            {"class": "a.B", "n_workers": 1},
            ".* the region of the cluster of class a.B, which is unknown; add cluster.region$",
        ),
        ({"class": "a.B", "n_workers": 1, "region": "us-east-1"}, "the cluster of class a.B is in us-east-1, but"),
        ({"address": "127.0.0.1:8786", "region": "us-east-1"}, "the cluster at 127.0.0.1:8786 is in us-east-1, but"),
        ({"kind": "ec2", "docker_image": "i", "region": "us-east-1"}, "the cluster on EC2 is in us-east-1, but"),
        ({**AZURE, "location": "uksouth"}, "the cluster on Azure is in uksouth, but"),
        ({"kind": "ec2", "docker_image": "i"}, "no region is set for the cluster on EC2; add cluster.region"),
        (
            {"kind": "ec2", "docker_image": "i", "region": "eu-west-3", "availability_zone": ["eu-west-3a", "x-1a"]},
            "expected cluster.availability_zone to name a zone of eu-west-3 such as eu-west-3a, found x-1a",
        ),
    ],
    ids=["address", "custom", "custom elsewhere", "tunnel", "ec2", "azure", "ec2 nowhere", "zone"],
)
def test_cluster_that_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], problem: str
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with pytest.raises(ResidencyError, match=f"^cluster: {problem}"):
        check_regions(make_config(cluster=cluster))


def test_scheduler_that_is_used_instead_is_checked(make_config: MakeConfig) -> None:
    elsewhere = make_config(cluster={"kind": "ec2", "docker_image": "i", "region": "us-east-1"})
    assert check_regions(elsewhere, scheduler="tcp://127.0.0.1:1")["cluster"] == "local"
    with pytest.raises(ResidencyError, match="the cluster at tcp://10.0.0.5:1, .*add cluster.region to a"):
        check_regions(make_config(), scheduler="tcp://10.0.0.5:1")


@pytest.mark.parametrize(
    ("allowed", "hint"),
    [
        (["eu-west3", "eu"], "has eu-west3, eu (the European Union); .*; did you mean eu-west-3 instead of eu-west3"),
        (["us-east1"], "did you mean us-east-1 instead of us-east1"),
        (["westeurop"], "did you mean westeurope instead of westeurop"),
        (["us-east-2"], "privacy.allowed_regions$"),
        (["mars-north-1"], "has mars-north-1; choose .* or change privacy.allowed_regions$"),
        ([], "privacy.allowed_regions has none"),
    ],
    ids=["and eu", "outside", "azure", "a real one", "nothing near", "none"],
)
def test_names_of_regions_get_a_hint(make_config: MakeConfig, allowed: list[str], hint: str) -> None:
    config = make_config(allowed, input={"url": f"s3://{VIRGINIA}/in"})
    with pytest.raises(ResidencyError, match=hint.replace("(", r"\(").replace(")", r"\)")):
        check_regions(config)


@pytest.mark.slow
def test_exploration_of_allowed_places_records_them(make_config: MakeConfig, server: Server, client: Any) -> None:
    privacy = {
        "allowed_regions": "eu",
        "controller": "The Orchard, Paris",
        "purpose": "sorting apples",
        "retention_days": 30,
    }
    options = {"storage_options": {"endpoint_url": server.url}}
    output = {"url": f"s3://{PARIS}/explored"} | options
    config = make_config(input={"url": f"s3://{PARIS}/in"}, output=output, privacy=privacy, **SMALL)
    found = fruitdask.explore(config, client=client).summary
    assert found["regions"] == {"input": "eu-west-3", "output": "eu-west-3", "cluster": "local"}
    record = found["processing"]
    assert record["purpose"] == "sorting apples" and record["in_transit"] == "one machine"
    days = date.fromisoformat(record["keep_until"]) - datetime.fromisoformat(found["finished"]).date()
    assert days.days == record["retention_days"] == 30
    # Nothing is computed again, but the record follows the present configuration.
    later = config.model_copy(update={"privacy": config.privacy.model_copy(update={"purpose": "selling apples"})})
    server.requests.clear()
    fruitdask.explore(later, client=client)
    changed = store.read_exploration_manifest(Location(**output))
    assert changed is not None and changed.dump() == found | {"processing": record | {"purpose": "selling apples"}}
    assert not [request for request in server.requests if ".jpg" in request]
    page = Location(f"{output['url']}/report.html", options["storage_options"])
    text = page.fs.cat_file(page.path).decode()
    assert all(
        words in text for words in ("selling apples", "The Orchard, Paris", "(30 days)", "eu-west-3 (Paris, France)")
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["storage_options", "bucket"])
def test_required_encryption_is_checked(make_config: MakeConfig, server: Server, client: Any, way: str) -> None:
    options: dict[str, Any] = {"endpoint_url": server.url}
    url, bucket = f"s3://{PARIS}/{way}", {"Bucket": PARIS}
    privacy = {"allowed_regions": "eu", "require_encryption": True}
    sections = {"input": {"url": f"s3://{PARIS}/in"}, "privacy": privacy, "report": {"enabled": False}, **SMALL}
    bare = make_config(output={"url": url, "storage_options": options}, **copy.deepcopy(sections))
    with pytest.raises(ResidencyError, match=f"^output: {url}/explore.json was stored without encryption"):
        fruitdask.explore(bare, client=client)
    # By then no photograph has been read, and only the description of the exploration has been written.
    assert not [request for request in server.requests if ".jpg" in request]
    written = {request.rpartition("/")[2] for request in server.requests if request.startswith("PUT")}
    assert written == {"explore.json", "run.lock"}
    s3 = boto3.client("s3", endpoint_url=server.url, region_name="eu-west-3")
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    if way == "bucket":
        s3.put_bucket_encryption(**bucket, ServerSideEncryptionConfiguration={"Rules": [rule]})
    else:
        options = options | {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}
    found = fruitdask.explore(make_config(output={"url": url, "storage_options": options}, **sections), client=client)
    s3.delete_bucket_encryption(**bucket)
    s3.close()
    assert found.summary["processing"]["at_rest"] == "AES256"


def test_describe_processing_counts_days_from_the_end() -> None:
    sections = {"input": {"url": "a"}, "output": {"url": "b"}, "privacy": {"retention_days": 30}}
    record = describe_processing(fruitdask.load_config(sections).privacy, since="2026-02-27T23:30:00+00:00")
    assert record["keep_until"] == "2026-03-29"
    none = describe_processing(fruitdask.load_config(sections | {"privacy": {}}).privacy)
    assert {none[key] for key in ("keep_until", "retention_days", "purpose", "controller")} == {None}
