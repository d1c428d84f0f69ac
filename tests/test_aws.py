"""Errors of real AWS clients become sentences that say what to do."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from botocore.exceptions import ClientError, ProfileNotFound

from fruitdask.core.aws import create_client, explain_aws_error
from fruitdask.core.storage import Location, exists, hash_file, write_file
from fruitdask.errors import StorageError

KEY = "AKIAIOSFODNN7EXAMPLE"


class Refusal(BaseHTTPRequestHandler):
    """Responds to each request with the same S3 error."""

    protocol_version = "HTTP/1.1"
    status, code, message = 403, "AccessDenied", "Access Denied"

    def refuse(self) -> None:
        """Send the error, with a body unless the client requests only headers."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        about = f"<Code>{self.code}</Code><Message>{self.message}</Message><AWSAccessKeyId>{KEY}</AWSAccessKeyId>"
        body = f"<Error>{about}</Error>"
        # After a redirection without a region, botocore would request the headers forever.
        self.send_response(403 if self.command == "HEAD" else self.status)
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body.encode())

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = refuse

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def refusing(request: pytest.FixtureRequest, s3_server: str) -> Iterator[dict[str, Any]]:
    """Start a server that sends the status, code and message of a parameter; yield its storage options."""
    status, code, message = request.param
    handler = type("Handler", (Refusal,), {"status": status, "code": code, "message": message})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {"endpoint_url": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()
        thread.join()


@pytest.fixture
def without_credentials(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Remove the user's credentials, and return the storage options of the S3 server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "BOTO_CONFIG"):
        monkeypatch.setenv(name, "/dev/null")
    return {"endpoint_url": s3_server, "skip_instance_cache": True}


@pytest.mark.parametrize(
    ("refusing", "advice"),
    [
        ((403, "AccessDenied", "Access Denied"), r"do not allow s3:PutObject; fruitdask iam-policy CONFIG"),
        ((400, "ExpiredToken", "The provided token has expired."), r"have expired; log in again"),
        (
            (403, "InvalidAccessKeyId", f"{KEY} is not in our records."),
            r"does not know these credentials; check AWS_PRO",
        ),
        ((403, "SignatureDoesNotMatch", "Check your key"), r"does not know these credentials; check AWS_PROFILE"),
        ((301, "PermanentRedirect", "Use the endpoint"), r"in another region; give it in .*region_name: \.\.\.}"),
        (
            (400, "AuthorizationHeaderMalformed", "The region is wrong"),
            r"in another region; give it in storage_options",
        ),
        ((404, "NoSuchBucket", "It does not exist"), r"there is no such bucket; check the URL"),
        ((400, "InvalidStorageClass", "It is not valid"), r"It is not valid \(InvalidStorageClass\)$"),
    ],
    indirect=["refusing"],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_s3_error_becomes_one_sentence(refusing: dict[str, Any], advice: str) -> None:
    with pytest.raises(StorageError, match=rf"^cannot write s3://bucket/a/x\.bin: PutObject: .*{advice}") as caught:
        write_file(Location("s3://bucket/a/x.bin", refusing), b"data")
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("refusing", [(403, "AccessDenied", "Access Denied")], indirect=True, ids=["AccessDenied"])
def test_denied_read_names_the_action_and_the_file(refusing: dict[str, Any]) -> None:
    message = r"^cannot read s3://bucket/x: HeadObject: Forbidden \(403\): these credentials do not allow s3:GetObject;"
    with pytest.raises(StorageError, match=message):
        hash_file(Location("s3://bucket/x", refusing))


def test_missing_credentials_are_explained(without_credentials: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match="read s3://bucket/x: .*: found no AWS credentials; log in"):
        exists(Location("s3://bucket/x", without_credentials))


def test_unknown_profile_is_explained(without_credentials: dict[str, Any]) -> None:
    message = r"cannot read s3://bucket/x: .*\(nobody\).*: there is no such profile; check AWS_PROFILE"
    with pytest.raises(StorageError, match=message):
        exists(Location("s3://bucket/x", without_credentials | {"profile": "nobody"}))
    with pytest.raises(ProfileNotFound, match="nobody") as caught:
        create_client("ec2", profile="nobody")
    assert "there is no such profile" in str(explain_aws_error(caught.value))


def test_explain_aws_error_finds_the_cause_of_other_errors() -> None:
    cause = ClientError({"Error": {"Code": "UnauthorizedOperation", "Message": "No\n  way"}}, "RunInstances")
    try:
        try:
            raise cause
        except ClientError as error:
            raise PermissionError("translated") from error
    except PermissionError as error:
        said = explain_aws_error(error)
    assert said == (
        "RunInstances: No way (UnauthorizedOperation): these credentials do not allow it; "
        "fruitdask iam-policy CONFIG prints the policies that do"
    )
    assert explain_aws_error(OSError("of a disk")) is None
