"""The API of AWS: clients that find credentials by the usual chain, and explanations of its errors."""

from collections.abc import Iterator
from functools import cache
from typing import Any

#: Tag of the instances and volumes of a run; its value is the run's id.
RUN_TAG = "fruitdask:run"
#: What to do, by the codes of AWS errors; ACTION stands for what was refused.
_ADVICE = {
    "the credentials have expired; log in again (aws sso login, or a new session token)": (
        "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired"
    ),
    "AWS does not know these credentials; check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY": (
        "InvalidClientTokenId InvalidAccessKeyId AuthFailure SignatureDoesNotMatch UnrecognizedClientException"
    ),
    "these credentials do not allow ACTION; fruitdask iam-policy CONFIG prints the policies that do": (
        "AccessDenied AccessDeniedException UnauthorizedOperation 403 Forbidden"
    ),
    "there is no such bucket; check the URL": "NoSuchBucket",
    "there is no such object, or no such bucket; check the URL": "NoSuchKey NotFound 404",
    "the bucket is in another region; give it in storage_options: client_kwargs: {region_name: ...}": (
        "PermanentRedirect 301 AuthorizationHeaderMalformed IllegalLocationConstraintException"
    ),
    "AWS has no capacity there now; try another instance type, another availability_zone, or spot: false": (
        "InsufficientInstanceCapacity InsufficientHostCapacity SpotMaxPriceTooLow"
    ),
    "the account's quota is used up; request more in Service Quotas, or use fewer or smaller workers": (
        "VcpuLimitExceeded InstanceLimitExceeded MaxSpotInstanceCountExceeded"
    ),
    "there is no such machine image in this region; check cluster.ami, or remove it": (
        "InvalidAMIID.NotFound InvalidAMIID.Malformed InvalidAMIID.Unavailable"
    ),
    "this zone does not offer that instance type; choose another one": "Unsupported InvalidInstanceType",
    "there is no such subnet in this region; check cluster.subnet_id": "InvalidSubnetID.NotFound InvalidSubnet",
    "there is no such security group; check cluster.security_groups": "InvalidGroup.NotFound InvalidGroupId.Malformed",
    "there is no such key pair in this region; check cluster.key_name": "InvalidKeyPair.NotFound",
    "there is no such VPC in this region; check cluster.vpc": "InvalidVpcID.NotFound",
    "AWS received too many requests; try again later": "SlowDown RequestLimitExceeded Throttling",
    "the server has failed; try again later": "InternalError ServiceUnavailable 500 502 503 504",
}
_ADVICE_BY_CODE = {code: advice for advice, codes in _ADVICE.items() for code in codes.split()}

#: The same for errors that botocore raises before it sends a request, by the name of their class.
_ADVICE_BY_CLASS = {
    "NoCredentialsError": "found no AWS credentials; log in (aws configure, aws sso login) or set AWS_PROFILE",
    "PartialCredentialsError": "the AWS credentials are incomplete; set both the access key and the secret key",
    "ProfileNotFound": "there is no such profile; check AWS_PROFILE and ~/.aws/config",
    "NoRegionError": "no AWS region is set; give cluster.region, or set AWS_DEFAULT_REGION",
    "UnauthorizedSSOTokenError": "the AWS login has expired; log in again: aws sso login",
    "TokenRetrievalError": "the AWS login has expired; log in again: aws sso login",
    "EndpointConnectionError": "no server answers there; check the network and endpoint_url",
    "ConnectTimeoutError": "no server answered in time; check the network and endpoint_url",
    "ConnectionClosedError": "the server closed the connection; check the network and endpoint_url, or try again",
    "ReadTimeoutError": "the server stopped answering; check the network and endpoint_url, or try again",
    "ParamValidationError": "check the name of the bucket in the URL",
    "SSLError": "give the server's certificate authority in storage_options: client_kwargs: {verify: FILE}",
}

#: The IAM action that an operation of S3 needs.
_ACTION_OF_OPERATION = {
    **dict.fromkeys(("CompleteMultipartUpload", "CreateMultipartUpload", "PutObject", "UploadPart"), "s3:PutObject"),
    **dict.fromkeys(("DeleteObject", "DeleteObjects"), "s3:DeleteObject"),
    **dict.fromkeys(("GetObject", "HeadObject"), "s3:GetObject"),
    **dict.fromkeys(("HeadBucket", "ListObjectsV2"), "s3:ListBucket"),
}


def create_client(
    service: str, *, region: str | None = None, profile: str | None = None, endpoint_url: str | None = None
) -> Any:
    """Create a client of an AWS service."""
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session(profile=profile)
    session.register_component("data_loader", _create_loader(session.get_config_variable("data_path")))
    settings = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10, read_timeout=60)
    return session.create_client(service, region_name=region, endpoint_url=endpoint_url, config=settings)


def find_default_region() -> str | None:
    """Find the region of the AWS profile or environment."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        region: str | None = botocore.session.Session().get_config_variable("region")
    except BotoCoreError:
        # The profile does not exist; the first client that uses it reports this.
        return None
    return region


def explain_aws_error(error: BaseException) -> str | None:
    """Explain an AWS error and what to do; None for other errors.

    >>> from botocore.exceptions import ClientError
    >>> explain_aws_error(ClientError({"Error": {"Code": "NoSuchBucket", "Message": "Gone"}}, "ListObjectsV2"))
    'ListObjectsV2: Gone (NoSuchBucket): there is no such bucket; check the URL'
    """
    for cause in list_causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code, message = (str(response["Error"].get(key, "")) for key in ("Code", "Message"))
            operation = getattr(cause, "operation_name", "AWS")
            said = f"{operation}: {' '.join(message.split()) or 'refused'} ({code})"
            advice = _ADVICE_BY_CODE.get(code, "").replace("ACTION", _ACTION_OF_OPERATION.get(operation, "it"))
            return f"{said}: {advice}" if advice else said
        if type(cause).__module__.startswith("botocore") and type(cause).__name__ in _ADVICE_BY_CLASS:
            return f"{' '.join(str(cause).split())}: {_ADVICE_BY_CLASS[type(cause).__name__]}"
    return None


@cache
def _create_loader(data_path: str | None) -> Any:
    """Create the loader of service descriptions once: EC2's takes up to half a second to load."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and the errors that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
