"""The page of similar images: queries and what was found for them, side by side."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

#: Columns of the table that are not details of an image.
_KNOWN = ("query", "rank", "path", "distance")


def render_matches(table: pd.DataFrame, *, title: str, pictures: Mapping[str, str | None]) -> str:
    """Render the table of similar images, with pictures, WebP in Base64, by query and path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    details = [name for name in table if name not in _KNOWN]
    matches = [
        {
            "query": query,
            "picture": pictures.get(str(query)),
            "rows": [
                {
                    "path": row["path"],
                    "distance": f"{row['distance']:.4g}",
                    "details": [str(row[name]) for name in details if row[name]],
                    "picture": pictures.get(row["path"]),
                }
                for row in rows.to_dict("records")
            ],
        }
        for query, rows in table.groupby("query", sort=False)
    ]
    return environment.get_template("similar.html").render(title=title, matches=matches)
