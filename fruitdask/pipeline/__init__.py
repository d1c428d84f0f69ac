"""The stages in their order, and nothing else.

A run (``running``; what there is to do: ``preparing``; what has changed since the one before: ``growing``; features: ``featurizing``; its
numbers: ``reducing``; what it leaves: ``results``), an exploration (``exploring``), figures and page (``presenting``), the record of
processing (``processing``), what a run will take (``planning``, from images that ``trying`` tries) and has cost (``spending``), what takes
images out of results again (``erasing``), what reads all results again (``verifying``, part by part: ``checking``) and prepares them for a
run that mends them (``repairing``).
"""

from fruitdask.pipeline.erasing import Erasure, carry_out, erase, plan_erasure
from fruitdask.pipeline.exploring import explore
from fruitdask.pipeline.growing import format_changes
from fruitdask.pipeline.planning import Plan
from fruitdask.pipeline.presenting import Report, render_report
from fruitdask.pipeline.results import RunResult
from fruitdask.pipeline.running import plan, run
from fruitdask.pipeline.verifying import Verification, verify

__all__ = [
    "Erasure",
    "Plan",
    "Report",
    "RunResult",
    "Verification",
    "carry_out",
    "erase",
    "explore",
    "format_changes",
    "plan",
    "plan_erasure",
    "render_report",
    "run",
    "verify",
]
