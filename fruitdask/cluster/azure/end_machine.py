"""Deletes the machine that runs it, by Azure's API and with the machine's identity.

Machines get this file in their custom data, so it uses nothing but Python's standard library. It succeeds when Azure
has accepted the request; if the identity may not delete it, the shell shuts the machine down instead.
"""

import json
import sys
import time
from urllib.parse import quote
from urllib.request import Request, urlopen

_METADATA = "http://169.254.169.254/metadata"
_MANAGER = "https://management.azure.com"
_PAUSES_SECONDS = (1, 5, 10, 30, 60)


def main() -> None:
    """Try a few times: the network may fail, and new roles take a while to work."""
    for pause in _PAUSES_SECONDS:
        try:
            return delete_machine()
        except (OSError, ValueError, KeyError) as error:
            print(f"fruitdask: this machine cannot delete itself: {error}", file=sys.stderr, flush=True)
            time.sleep(pause)
    sys.exit(1)


def delete_machine() -> None:
    """Ask Azure to delete this machine; its disk, network interface and address go with it."""
    machine = json.loads(ask(f"{_METADATA}/instance/compute?api-version=2021-02-01", {"Metadata": "true"}))
    query = f"api-version=2018-02-01&resource={quote(_MANAGER, safe='')}"
    token = json.loads(ask(f"{_METADATA}/identity/oauth2/token?{query}", {"Metadata": "true"}))["access_token"]
    url = f"{_MANAGER}{machine['resourceId']}?api-version=2024-07-01"
    ask(url, {"Authorization": f"Bearer {token}"}, method="DELETE")


def ask(url: str, headers: dict[str, str], *, method: str = "GET") -> bytes:
    """Send a request, and read the answer."""
    with urlopen(Request(url, headers=headers, method=method), timeout=30) as response:
        answer: bytes = response.read()
    return answer


if __name__ == "__main__":
    main()
