"""Map a bucket full of photographs: Keras features on a Dask cluster, stored as Zarr, reduced with PCA and t-SNE.

Names are imported when they are first used (PEP 562), so that ``import fruitdask`` costs almost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fruitdask.catalog import list_images as list_images
    from fruitdask.cluster import open_client as open_client
    from fruitdask.config import Config as Config, load_config as load_config
    from fruitdask.errors import FruitdaskError as FruitdaskError
    from fruitdask.exploration import Exploration as Exploration
    from fruitdask.models import build_artifact as build_artifact
    from fruitdask.neighbors import find_neighbors as find_neighbors, summarize_quality as summarize_quality
    from fruitdask.pipeline import (
        Erasure as Erasure,
        Plan as Plan,
        Report as Report,
        RunResult as RunResult,
        Verification as Verification,
        erase as erase,
        explore as explore,
        plan as plan,
        render_report as render_report,
        run as run,
        verify as verify,
    )
    from fruitdask.plots import plot_map as plot_map
    from fruitdask.progress import choose_progress as choose_progress
    from fruitdask.reduce import embed_tsne as embed_tsne, fit_pca as fit_pca
    from fruitdask.sample import draw_sample as draw_sample

_ROOM_OF_NAME = {
    "Config": "config",
    "Erasure": "pipeline",
    "Exploration": "exploration",
    "FruitdaskError": "errors",
    "Plan": "pipeline",
    "Report": "pipeline",
    "RunResult": "pipeline",
    "Verification": "pipeline",
    "build_artifact": "models",
    "choose_progress": "progress",
    "draw_sample": "sample",
    "embed_tsne": "reduce",
    "erase": "pipeline",
    "explore": "pipeline",
    "find_neighbors": "neighbors",
    "fit_pca": "reduce",
    "list_images": "catalog",
    "load_config": "config",
    "open_client": "cluster",
    "plan": "pipeline",
    "plot_map": "plots",
    "render_report": "pipeline",
    "run": "pipeline",
    "summarize_quality": "neighbors",
    "verify": "pipeline",
}

__all__ = sorted(_ROOM_OF_NAME)


def __getattr__(name: str) -> Any:
    """Import the room of a public name on first use."""
    if name not in _ROOM_OF_NAME:
        raise AttributeError(f"module 'fruitdask' has no attribute {name!r}")
    return getattr(import_module(f"fruitdask.{_ROOM_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names for tab completion."""
    return [*__all__, "__version__"]
