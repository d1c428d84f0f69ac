"""The stages in their order, and nothing else: a run (``running``), an exploration (``exploring``), figures and page (``presenting``),
what a run will take (``planning``, from images that ``trying`` tries) and has cost (``spending``), and what takes images out of results
again (``erasing``).
"""

from fruitdask.pipeline.erasing import Erasure, carry_out, erase, plan_erasure
from fruitdask.pipeline.exploring import explore
from fruitdask.pipeline.planning import Plan
from fruitdask.pipeline.presenting import Report, render_report
from fruitdask.pipeline.running import RunResult, plan, run

__all__ = [
    "Erasure",
    "Plan",
    "Report",
    "RunResult",
    "carry_out",
    "erase",
    "explore",
    "plan",
    "plan_erasure",
    "render_report",
    "run",
]
