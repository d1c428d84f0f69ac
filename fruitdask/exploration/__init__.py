"""Exploration: what the images themselves say, before any network looks at them.

Tasks look at each image once (``partition``); the client puts together what they found (``summary``, ``duplicates``) and keeps it
(``files``).
"""

from fruitdask.exploration.files import Exploration, check_exploration, read_exploration, write_exploration
from fruitdask.exploration.partition import (
    ClassSums,
    ExploreJob,
    Explorer,
    Findings,
    explore_partition,
    probe_exploration,
)
from fruitdask.exploration.summary import (
    Measured,
    Tally,
    Yardstick,
    mean_squared_difference,
    measure_partition,
    summarize_findings,
)

__all__ = [
    "ClassSums",
    "Exploration",
    "ExploreJob",
    "Explorer",
    "Findings",
    "Measured",
    "Tally",
    "Yardstick",
    "check_exploration",
    "explore_partition",
    "mean_squared_difference",
    "measure_partition",
    "probe_exploration",
    "read_exploration",
    "summarize_findings",
    "write_exploration",
]
