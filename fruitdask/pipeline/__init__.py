"""The stages in their order, and nothing else: a run (``running``), an exploration (``exploring``), figures and page (``presenting``)."""

from fruitdask.pipeline.exploring import explore
from fruitdask.pipeline.presenting import Report, render_report
from fruitdask.pipeline.running import RunResult, run

__all__ = ["Report", "RunResult", "explore", "render_report", "run"]
