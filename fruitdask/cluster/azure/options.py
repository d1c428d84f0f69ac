"""Options of AzureVMCluster and of its machines from the configuration."""

import json
import math
from pathlib import Path
from typing import Any

from fruitdask.cluster.cloud.options import INSTALL_DOCKER, build_shared_options, quote_commands
from fruitdask.core.config import AzureClusterConfig

#: Images of machines, without and with NVIDIA's drivers; the latter has Docker.
#: https://documentation.ubuntu.com/azure/azure-how-to/instances/find-ubuntu-images
#: https://learn.microsoft.com/azure/virtual-machines/azure-hpc-vm-images
_IMAGES = {
    False: {"publisher": "Canonical", "offer": "ubuntu-24_04-lts", "sku": "server", "version": "latest"},
    True: {"publisher": "microsoft-dsvm", "offer": "ubuntu-hpc", "sku": "2204", "version": "latest"},
}
_END_PATH = "/opt/fruitdask/end_machine.py"
#: Deletes the machine; shuts it down if it may not delete itself, or still runs after ten minutes.
_END = f"python3 {_END_PATH} && sleep 600; shutdown -h now"


def build_options(config: AzureClusterConfig, *, subscription: str) -> dict[str, Any]:
    """Build the options of AzureVMCluster."""
    return {
        **build_shared_options(config),
        "subscription_id": subscription,
        "location": config.location,
        "resource_group": config.resource_group,
        "vnet": config.vnet,
        "security_group": config.security_group,
        "public_ingress": config.public_ingress,
        "vm_size": config.types[1],
        "scheduler_vm_size": config.types[0],
        "disk_size": config.disk_size,
        "bootstrap": False,
        # That would only stop the machine, which costs money until it is deleted.
        "auto_shutdown": False,
        "extra_bootstrap": _build_bootstrap(config),
    }


def find_image(config: AzureClusterConfig, *, has_gpu: bool) -> dict[str, str]:
    """Find the image of machines."""
    return config.vm_image or _IMAGES[has_gpu]


def add_end(custom_data: str) -> str:
    """Add to custom data the commands that delete the machine after the container has ended."""
    script = Path(__file__).with_name("end_machine.py").read_text(encoding="utf-8")
    # JSON strings are valid YAML.
    files = [{"path": _END_PATH, "content": script}]
    return f"{custom_data.rstrip()}\n  - {json.dumps(_END)}\nwrite_files: {json.dumps(files)}\n"


def build_machine(config: AzureClusterConfig, *, is_spot: bool, identity: str | None) -> dict[str, Any]:
    """Build the properties of a machine for Resource Manager, except its name, image, disk and network."""
    properties: dict[str, Any] = {"diagnosticsProfile": {"bootDiagnostics": {"enabled": True}}}
    if is_spot:
        # A maximum price of -1 stands for the price on demand.
        properties |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    if config.encryption_at_host:
        properties["securityProfile"] = {"encryptionAtHost": True}
    machine: dict[str, Any] = {"properties": properties}
    if identity is not None:
        machine["identity"] = {"type": "UserAssigned", "userAssignedIdentities": {identity: {}}}
    return machine


def find_identity(config: AzureClusterConfig, subscription: str) -> str | None:
    """Find the resource id of the machines' identity, which may be given by its name in the resource group."""
    if config.identity is None or config.identity.startswith("/"):
        return config.identity
    group = f"/subscriptions/{subscription}/resourceGroups/{config.resource_group}"
    return f"{group}/providers/Microsoft.ManagedIdentity/userAssignedIdentities/{config.identity}"


def _build_bootstrap(config: AzureClusterConfig) -> list[str]:
    """Build the commands before the container; first the end after the lifetime, whatever fails later."""
    lifetime = f"systemd-run --on-active={math.ceil(config.max_lifetime)} /bin/sh -c '{_END}'"
    return quote_commands([lifetime, INSTALL_DOCKER, *config.extra_bootstrap])
