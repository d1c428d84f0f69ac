"""Amazon's API: clients that find credentials by the usual chain, and its errors in words."""

from collections.abc import Iterator, Mapping
from typing import Any

#: What to do, by the code of an error of AWS. The first of each line names the kind.
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
        "these credentials do not allow it; fruitdask iam-policy CONFIG prints the policies that do"
    ),
    ("NoSuchBucket",): "there is no such bucket; check the URL",
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
}


def create_client(
    service: str, *, region: str | None = None, profile: str | None = None, endpoint_url: str | None = None
) -> Any:
    """
    Create a client of one of Amazon's services.

    Parameters
    ----------
    service : str
        Its name, such as ``ec2``.
    region : str, optional
        The region; by default that of the profile or the environment.
    profile : str, optional
        A profile of the user's AWS configuration.
    endpoint_url : str, optional
        Another server than Amazon's; ``AWS_ENDPOINT_URL`` counts too.

    Returns
    -------
    botocore.client.BaseClient
        The client. Credentials come from the usual chain and nowhere else.

    Raises
    ------
    botocore.exceptions.BotoCoreError
        If there is no such profile, or no region; `explain_aws_error` puts it into words.
    """
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session(profile=profile)
    settings = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10, read_timeout=60)
    return session.create_client(service, region_name=region, endpoint_url=endpoint_url, config=settings)


def explain_aws_error(error: BaseException) -> str | None:
    """
    Say what an error of AWS means and what to do.

    Parameters
    ----------
    error : BaseException
        The error, or one that was raised from it, as s3fs does.

    Returns
    -------
    str or None
        What was asked, what AWS answered and what to do, in one line; None where it is no error of AWS.

    Examples
    --------
    >>> from botocore.exceptions import ClientError
    >>> explain_aws_error(ClientError({"Error": {"Code": "NoSuchBucket", "Message": "Gone"}}, "ListObjectsV2"))
    'ListObjectsV2: Gone (NoSuchBucket): there is no such bucket; check the URL'
    """
    for cause in _list_causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code, message = (str(response["Error"].get(key, "")) for key in ("Code", "Message"))
            said = f"{getattr(cause, 'operation_name', 'AWS')}: {' '.join(message.split()) or 'refused'} ({code})"
            advice = _ADVICE_BY_CODE.get(code)
            return f"{said}: {advice}" if advice else said
        if type(cause).__module__.startswith("botocore") and type(cause).__name__ in _ADVICE_BY_CLASS:
            return f"{' '.join(str(cause).split())}: {_ADVICE_BY_CLASS[type(cause).__name__]}"
    return None


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and those it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
