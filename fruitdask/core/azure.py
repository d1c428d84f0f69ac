"""Explanations of errors of Azure: what happened in one sentence, and what to do."""

import logging
from typing import Any

from fruitdask.core.aws import list_causes

# The clients log each request, and failures that are also raised; only --verbose shows the latter.
logging.getLogger("azure").addHandler(logging.NullHandler())
logging.getLogger("azure.core.pipeline.policies.http_logging_policy").setLevel(logging.WARNING)

#: Tag of everything that a run creates on Azure; its value is the run's id.
RUN_TAG = "fruitdask-run"
_CREDENTIALS = "account_key, sas_token or connection_string in storage_options"
#: What to do, by the codes of an error of Azure Storage: https://learn.microsoft.com/rest/api/storageservices
_ADVICE = {
    f"the account does not accept this key or SAS token, which is wrong or has expired; correct {_CREDENTIALS}": (
        "AuthenticationFailed InvalidAuthenticationInfo 401"
    ),
    f"the account refuses these credentials, or requests from this network; check {_CREDENTIALS}, and the account's "
    "firewall": "AuthorizationFailure AuthorizationSourceIPMismatch AccountIsDisabled",
    "these credentials do not allow it; give the role Storage Blob Data Reader for an input and Storage Blob Data "
    "Contributor for an output, or a SAS token that may read, list, create, write and delete": (
        "AuthorizationPermissionMismatch AuthorizationResourceTypeMismatch AuthorizationServiceMismatch "
        "InsufficientAccountPermissions 403"
    ),
    "the account does not accept keys; log in (az login) and remove them from storage_options": (
        "KeyBasedAuthenticationNotPermitted"
    ),
    f"the container is not public; log in (az login), or give {_CREDENTIALS}": (
        "NoAuthenticationInformation PublicAccessNotPermitted"
    ),
    "there is no such container; create it, or check the URL": "ContainerNotFound ContainerBeingDeleted",
    "there is no such blob, or no such container; check the URL": "BlobNotFound ResourceNotFound 404",
    "check the name of the container in the URL: 3 to 63 lower-case letters, digits and hyphens": (
        "InvalidResourceName OutOfRangeInput InvalidUri"
    ),
    "it is in the archive tier; move it to another access tier first": "BlobArchived BlobBeingRehydrated",
    "a lease, a legal hold or a policy protects it; remove that, or choose another container": (
        "LeaseIdMissing BlobImmutableDueToPolicy"
    ),
    "Azure received too many requests; try again later": "ServerBusy 503",
    "the server has failed; try again later": "InternalError OperationTimedOut 500 502 504",
}
_ADVICE_BY_CODE = {code: advice for advice, codes in _ADVICE.items() for code in codes.split()}

#: The same for Resource Manager, which starts machines.
_ARM_ADVICE = {
    "there is no such subscription, or these credentials cannot see it; check cluster.subscription_id (az account "
    "list)": "SubscriptionNotFound InvalidSubscriptionId InvalidAuthenticationTokenTenant",
    "there is no such resource group; create it (az group create), or check its name": "ResourceGroupNotFound",
    "these credentials do not allow it; fruitdask iam-policy CONFIG prints the roles that do": (
        "AuthorizationFailed LinkedAuthorizationFailed 403"
    ),
    "log in again (az login)": "AuthenticationFailed ExpiredAuthenticationToken InvalidAuthenticationToken 401",
    "the quota of the subscription is used up; ask for more (az vm list-usage), or use fewer or smaller workers": (
        "QuotaExceeded OperationNotAllowed"
    ),
    "Azure has no capacity there now; try another cluster.vm_size, another location, or spot: false": (
        "SkuNotAvailable AllocationFailed ZonalAllocationFailed OverconstrainedAllocationRequest"
    ),
    "there is no such location, or it has no such machines; check cluster.location": (
        "LocationNotAvailableForResourceType InvalidLocation NoRegisteredProviderFound"
    ),
    "there is no such image; check cluster.vm_image": "PlatformImageNotFound ImageNotFound GalleryImageNotFound",
    "it does not exist; check its name in the configuration": "ResourceNotFound NotFound 404",
    "Azure received too many requests; try again later": "TooManyRequests 429",
    "the server has failed; try again later": "InternalServerError InternalExecutionError 500 502 503 504",
}
_ARM_ADVICE_BY_CODE = {code: advice for advice, codes in _ARM_ADVICE.items() for code in codes.split()}

#: The same for errors without a response, by the name of their class or of that of their cause.
_ADVICE_BY_CLASS = {
    "AzureSigningError": f"the account key is malformed; correct {_CREDENTIALS}",
    "ClientConnectorCertificateError": "give the server's certificate authority in the variable SSL_CERT_FILE",
    "ClientConnectorError": "no server answers there; check the name of the storage account, and the network",
    "ServiceRequestTimeoutError": "no server answered in time; check the network",
    "ServiceResponseTimeoutError": "the server stopped answering; check the network, or try again",
    "ServiceRequestError": "the server closed the connection; check the network, or try again",
    "ServiceResponseError": "the server closed the connection; check the network, or try again",
    "IncompleteReadError": "the server closed the connection; check the network, or try again",
    "ClientAuthenticationError": f"found no Azure credentials; log in (az login), or give {_CREDENTIALS}",
}


def explain_azure_error(error: BaseException) -> str | None:
    """Explain an Azure error and what to do; None for other errors.

    >>> from azure.core.exceptions import ServiceResponseError
    >>> explain_azure_error(ServiceResponseError("Broken"))
    'Broken: the server closed the connection; check the network, or try again'
    """
    cause = next((cause for cause in list_causes(error) if type(cause).__module__.startswith("azure.")), None)
    if cause is None:
        return None
    # Further lines repeat the response, and what was signed.
    said = str(cause).strip().split("\n")[0].strip() or type(cause).__name__
    status = getattr(cause, "status_code", None)
    if status is not None:
        code, advices = _find_code(cause)
        said = said.removeprefix(f"({code}) ")
        advice = advices.get(code) or advices.get(str(status))
        return f"{said.rstrip('.')} ({code})" + (f": {advice}" if advice else "")
    classes = [*type(getattr(cause, "inner_exception", None)).__mro__, *type(cause).__mro__]
    advice = next((_ADVICE_BY_CLASS[each.__name__] for each in classes if each.__name__ in _ADVICE_BY_CLASS), None)
    return f"{said.rstrip('.')}: {advice}" if advice else said


def _find_code(error: Any) -> tuple[str, dict[str, str]]:
    """Find the code of an error, and what to do by codes: errors of Resource Manager have an object for it."""
    if not hasattr(error, "error_code") and (code := getattr(getattr(error, "error", None), "code", None)):
        return str(code), _ARM_ADVICE_BY_CODE
    code = getattr(error, "error_code", None) or error.status_code
    return str(getattr(code, "value", code)), _ADVICE_BY_CODE
