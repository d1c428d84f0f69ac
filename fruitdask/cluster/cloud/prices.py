"""The cost of machines in the cloud, by configured prices or a small table of EC2's. No price is fetched."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: The date of every price in this module, which are in US dollars without taxes. Change it with them.
PRICES_OF = "January 2026"

#: An hour of Linux on demand, from https://aws.amazon.com/ec2/pricing/on-demand, as SkyPilot and Karpenter quote it.
#: Add a column for a region, a row for a type. To update a price, read it on that page, or ask AWS:
#:
#:   aws pricing get-products --region us-east-1 --service-code AmazonEC2 --filters \
#:     Type=TERM_MATCH,Field=instanceType,Value=m6i.large Type=TERM_MATCH,Field=regionCode,Value=eu-west-3 \
#:     Type=TERM_MATCH,Field=operatingSystem,Value=Linux Type=TERM_MATCH,Field=preInstalledSw,Value=NA \
#:     Type=TERM_MATCH,Field=tenancy,Value=Shared Type=TERM_MATCH,Field=capacitystatus,Value=Used
_TABLE = """
            us-east-1  eu-west-1  eu-west-3  eu-central-1  eu-north-1
t3.large       0.0832     0.0912     0.0944        0.0960      0.0864
m6i.large      0.0960     0.1070     0.1120        0.1150      0.1020
c6i.large      0.0850     0.0912     0.1010        0.0970      0.0910
g4dn.xlarge    0.5260     0.5870     0.6150        0.6580      0.5580
g5.xlarge      1.0060
"""
#: The price of a size relative to the large one of its family.
_LARGES = {"medium": 0.5, "xlarge": 2.0, "2xlarge": 4.0}

#: Where regions differ a little, these are the highest prices of the regions above. A gp3 volume of 1 GB for 30 days:
#: https://aws.amazon.com/ebs/pricing; a public IPv4 address for an hour: https://aws.amazon.com/vpc/pricing
_VOLUME_DOLLARS = 0.0952
_ADDRESS_DOLLARS = 0.005
#: A GB from one region to another, and out of AWS: https://aws.amazon.com/ec2/pricing/on-demand/#Data_Transfer
_BETWEEN_REGIONS_DOLLARS = 0.02
_OUT_DOLLARS = 0.09
#: A thousand requests of S3 that read, and that write or list: https://aws.amazon.com/s3/pricing
_READS_DOLLARS = 0.00043
_WRITES_DOLLARS = 0.0054

#: The minimum time that is billed: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-on-demand-instances.html
_MIN_SECONDS = 60.0
_HOUR_SECONDS = 3600.0
_MONTH_SECONDS = 30 * 24 * _HOUR_SECONDS


@dataclass(frozen=True)
class Usage:
    """An instance that has run, or will run, for some time."""

    instance_type: str
    is_spot: bool
    region: str
    seconds: float

    @property
    def billed_seconds(self) -> float:
        """Seconds that are billed."""
        return max(self.seconds, _MIN_SECONDS)


@dataclass(frozen=True)
class Cost:
    """What instances cost, in US dollars without taxes.

    They exclude the surplus credits of t3 instances that are always busy, detailed monitoring and support.
    """

    #: The instances themselves, those that have a price.
    instances: float
    volumes: float = 0.0
    addresses: float = 0.0
    #: Types without a known price, each with its region.
    unpriced: tuple[str, ...] = ()

    @property
    def dollars(self) -> float:
        """The sum."""
        return self.instances + self.volumes + self.addresses


def find_hourly_price(
    instance_type: str, *, region: str, is_spot: bool, hourly_prices: Mapping[str, float] | None = None
) -> float | None:
    """Find what an instance costs per hour: the configuration's price, else the table's; None where neither has one.

    >>> find_hourly_price("m6i.large", region="eu-west-3", is_spot=False)
    0.112
    >>> find_hourly_price("m6i.large", region="eu-west-3", is_spot=True, hourly_prices={"spot:m6i.large": 0.04})
    0.04
    """
    prices = hourly_prices or {}
    if is_spot and f"spot:{instance_type}" in prices:
        return prices[f"spot:{instance_type}"]
    return prices.get(instance_type, _look_up_price(instance_type, region))


def _look_up_price(instance_type: str, region: str) -> float | None:
    """Look up the price on demand in the table, by the type or by its family's large one."""
    header, *rows = (line.split() for line in _TABLE.strip().splitlines())
    table = {(name, column): float(price) for name, *prices in rows for column, price in zip(header, prices)}
    family, _, size = instance_type.partition(".")
    large = table.get((f"{family}.large", region))
    scaled = large * _LARGES[size] if large is not None and size in _LARGES else None
    return table.get((instance_type, region), scaled)


def compute_cost(
    usages: Iterable[Usage],
    hourly_prices: Mapping[str, float] | None = None,
    *,
    volume_gb: int = 0,
    has_address: bool = False,
) -> Cost:
    """Compute what instances cost with their volumes and addresses.

    >>> compute_cost([Usage("m6i.large", False, "us-east-1", 7200)], volume_gb=40, has_address=True).dollars
    0.2125...
    """
    usages = list(usages)
    prices = [
        find_hourly_price(usage.instance_type, region=usage.region, is_spot=usage.is_spot, hourly_prices=hourly_prices)
        for usage in usages
    ]
    seconds = sum(usage.billed_seconds for usage in usages)
    unpriced = [usage for price, usage in zip(prices, usages, strict=True) if price is None]
    return Cost(
        instances=sum(
            (price or 0.0) * usage.billed_seconds / _HOUR_SECONDS for price, usage in zip(prices, usages, strict=True)
        ),
        volumes=_VOLUME_DOLLARS * volume_gb * seconds / _MONTH_SECONDS,
        addresses=_ADDRESS_DOLLARS * seconds / _HOUR_SECONDS if has_address else 0.0,
        unpriced=tuple(sorted({f"{usage.instance_type} in {usage.region}" for usage in unpriced})),
    )


def compute_transfer_cost(n_bytes: float, *, source: str | None, target: str | None) -> float:
    """Compute what AWS charges for moving bytes between regions, or out of AWS where `target` is None.

    >>> [compute_transfer_cost(1e10, source="eu-west-3", target=target) for target in ("eu-west-3", "eu-west-1", None)]
    [0.0, 0.2, 0.9]
    """
    if source is None or source == target:
        return 0.0
    return (_OUT_DOLLARS if target is None else _BETWEEN_REGIONS_DOLLARS) * n_bytes / 1e9


def compute_request_cost(*, n_reads: int, n_writes: int) -> float:
    """Compute what requests of S3 cost."""
    return (n_reads * _READS_DOLLARS + n_writes * _WRITES_DOLLARS) / 1000
