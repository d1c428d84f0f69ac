"""Amazon's API: clients that find credentials by the usual chain, and its errors in words."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

#: Tag of the instances and volumes of a run; its value is the run's id.
RUN_TAG = "fruitdask:run"
#: Regions of AWS inside the European Union; London and Zurich are not.
AWS_EU_REGIONS = (
    "eu-central-1",
    "eu-north-1",
    "eu-south-1",
    "eu-south-2",
    "eu-west-1",
    "eu-west-3",
    "eusc-de-east-1",
)

#: What to do, by the code of an error of AWS; ACTION stands for what was refused.
_ADVICE: Mapping[tuple[str, ...], str] = {
    ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"): (
        "the credentials have expired; log in again (aws sso login, or a new session token)"
    ),
    (
        "InvalidClientTokenId",
        "InvalidAccessKeyId",
        "AuthFailure",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    ): ("AWS does not know these credentials; check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "Forbidden"): (
        "these credentials do not allow ACTION; fruitdask iam-policy CONFIG prints the policies that do"
    ),
    ("NoSuchBucket",): "there is no such bucket; check the URL",
    ("NoSuchKey", "NotFound", "404"): "there is no such object, or no such bucket; check the URL",
    ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"): (
        "the bucket is in another region; give it in storage_options: client_kwargs: {region_name: ...}"
    ),
    ("InsufficientInstanceCapacity", "InsufficientHostCapacity", "SpotMaxPriceTooLow"): (
        "AWS has none left there at the moment; try another instance type, another availability_zone, or spot: false"
    ),
    ("VcpuLimitExceeded", "InstanceLimitExceeded", "MaxSpotInstanceCountExceeded"): (
        "the account's quota is used up; ask for more in Service Quotas, or take fewer or smaller workers"
    ),
    ("InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable"): (
        "there is no such machine image in this region; check cluster.ami, or leave it out"
    ),
    ("Unsupported", "InvalidInstanceType"): "this zone does not offer that instance type; take another one",
    ("InvalidSubnetID.NotFound", "InvalidSubnet"): "there is no such subnet in this region; check cluster.subnet_id",
    (
        "InvalidGroup.NotFound",
        "InvalidGroupId.Malformed",
    ): "there is no such security group; check cluster.security_groups",
    ("InvalidKeyPair.NotFound",): "there is no such key pair in this region; check cluster.key_name",
    ("InvalidVpcID.NotFound",): "there is no such VPC in this region; check cluster.vpc",
    ("SlowDown", "RequestLimitExceeded", "Throttling"): "AWS asks for fewer requests; try again in a while",
    ("InternalError", "ServiceUnavailable", "500", "502", "503", "504"): "the server has failed; try again in a while",
}
_ADVICE_BY_CODE = {code: advice for codes, advice in _ADVICE.items() for code in codes}

#: The same for errors that botocore finds before it asks AWS, by the name of their class.
_ADVICE_BY_CLASS = {
    "NoCredentialsError": "found no AWS credentials; log in (aws configure, aws sso login) or set AWS_PROFILE",
    "PartialCredentialsError": "the AWS credentials are incomplete; set both the access key and the secret key",
    "ProfileNotFound": "there is no such profile; check AWS_PROFILE and ~/.aws/config",
    "NoRegionError": "no AWS region is set; give cluster.region, or set AWS_DEFAULT_REGION",
    "UnauthorizedSSOTokenError": "the AWS login has expired; log in again: aws sso login",
    "TokenRetrievalError": "the AWS login has expired; log in again: aws sso login",
    "EndpointConnectionError": "nobody answers there; check the network and endpoint_url",
    "ConnectTimeoutError": "nobody answers there in time; check the network and endpoint_url",
    "ConnectionClosedError": "the server broke off; check the network and endpoint_url, or try again",
    "ReadTimeoutError": "the server stopped answering; check the network and endpoint_url, or try again",
    "ParamValidationError": "check the name of the bucket in the URL",
    "SSLError": "name the authority of the server's certificate in storage_options: client_kwargs: {verify: FILE}",
}

#: Actions of IAM that are called otherwise than the operations of S3 that need them.
_ACTION_OF_OPERATION = {
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
}


def create_client(
    service: str, *, region: str | None = None, profile: str | None = None, endpoint_url: str | None = None
) -> Any:
    """Create a client of one of Amazon's services."""
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
        # A profile that does not exist: whoever uses it says so.
        return None
    return region


def explain_aws_error(error: BaseException) -> str | None:
    """Say what an error of AWS means and what to do.

    >>> from botocore.exceptions import ClientError
    >>> explain_aws_error(ClientError({"Error": {"Code": "NoSuchBucket", "Message": "Gone"}}, "ListObjectsV2"))
    'ListObjectsV2: Gone (NoSuchBucket): there is no such bucket; check the URL'
    """
    for cause in _list_causes(error):
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
    """Create what reads the descriptions of services, once: that of EC2 takes up to half a second."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and those it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
