"""Map a bucket full of photographs: Keras features on a Dask cluster, stored as Zarr, reduced with PCA and t-SNE.

Names are imported when they are first used (PEP 562), so that ``import fruitdask`` costs almost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fruitdask.core.version import __version__ as __version__

if TYPE_CHECKING:
    from fruitdask.store.catalog import list_images as list_images
    from fruitdask.cluster import open_client as open_client
    from fruitdask.core.config import Config as Config, load_config as load_config
    from fruitdask.errors import FruitdaskError as FruitdaskError
    from fruitdask.store.exploration import Exploration as Exploration
    from fruitdask.worker.models import build_artifact as build_artifact
    from fruitdask.analysis.evaluation import summarize_quality as summarize_quality
    from fruitdask.analysis.neighbors import find_neighbors as find_neighbors
    from fruitdask.pipeline.apply import apply as apply
    from fruitdask.pipeline.check import check as check
    from fruitdask.pipeline.compare import Comparison as Comparison, compare as compare
    from fruitdask.pipeline.erase import Erasure as Erasure, erase as erase
    from fruitdask.pipeline.explore import explore as explore
    from fruitdask.pipeline.export import export as export
    from fruitdask.pipeline.open import open as open
    from fruitdask.pipeline.plan import Plan as Plan
    from fruitdask.pipeline.report import Report as Report, render_report as render_report
    from fruitdask.pipeline.results import RunResult as RunResult
    from fruitdask.pipeline.run import plan as plan, run as run
    from fruitdask.pipeline.train import Classifier as Classifier, predict as predict, train as train
    from fruitdask.pipeline.verify import Verification as Verification, verify as verify
    from fruitdask.report.figures import plot_map as plot_map
    from fruitdask.core.progress import choose_progress as choose_progress
    from fruitdask.analysis.pca import PCA as PCA
    from fruitdask.analysis.reduction import embed_tsne as embed_tsne
    from fruitdask.core.sample import draw_sample as draw_sample

_MODULE_OF_NAME = {
    "Classifier": "pipeline.train",
    "Comparison": "pipeline.compare",
    "Config": "core.config",
    "Erasure": "pipeline.erase",
    "Exploration": "store.exploration",
    "FruitdaskError": "errors",
    "PCA": "analysis.pca",
    "Plan": "pipeline.plan",
    "Report": "pipeline.report",
    "RunResult": "pipeline.results",
    "Verification": "pipeline.verify",
    "apply": "pipeline.apply",
    "build_artifact": "worker.models",
    "check": "pipeline.check",
    "choose_progress": "core.progress",
    "compare": "pipeline.compare",
    "draw_sample": "core.sample",
    "embed_tsne": "analysis.reduction",
    "erase": "pipeline.erase",
    "explore": "pipeline.explore",
    "export": "pipeline.export",
    "find_neighbors": "analysis.neighbors",
    "list_images": "store.catalog",
    "load_config": "core.config",
    "open": "pipeline.open",
    "open_client": "cluster",
    "plan": "pipeline.run",
    "plot_map": "report.figures",
    "predict": "pipeline.train",
    "render_report": "pipeline.report",
    "run": "pipeline.run",
    "summarize_quality": "analysis.evaluation",
    "train": "pipeline.train",
    "verify": "pipeline.verify",
}

__all__ = sorted(_MODULE_OF_NAME)


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'fruitdask' has no attribute {name!r}")
    return getattr(import_module(f"fruitdask.{_MODULE_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names for tab completion."""
    return [*__all__, "__version__"]
