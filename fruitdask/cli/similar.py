"""The command that finds similar images."""

import sys
from typing import TYPE_CHECKING

import click

from fruitdask.cli.common import find_output, reported, set_option, show, verbose_option

if TYPE_CHECKING:
    import pandas as pd

#: Columns of a table that is not printed to a terminal.
_PIPED_WIDTH = 240


@click.command()
@click.argument("output")
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option(
    "-k", "k", type=click.IntRange(min=1), default=20, show_default=True, help="Images to find for each PHOTO."
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "euclidean"]),
    default="cosine",
    show_default=True,
    help="Distance between features.",
)
@click.option("--html", metavar="FILE", help="Also write a page that shows queries and results side by side.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON instead of a table.")
@set_option
@verbose_option
def similar(
    output: str,
    photos: tuple[str, ...],
    k: int,
    metric: str,
    html: str | None,
    is_json: bool,
    overrides: tuple[str, ...],
    verbose: bool,
) -> None:
    """Find the images in OUTPUT that are most similar to each PHOTO.

    Those are the images whose features are nearest to the features of PHOTO.

    OUTPUT is the folder or URL of a finished run, or its configuration file, which also gives storage options. PHOTO is
    the path of an image of the run, as in its table, or any photograph: a file or a URL, whose features the network of
    the run computes on this machine. The search is exact. An image of the run is not among its own results.

    --html FILE contains small copies of the photographs, without metadata.
    """
    with reported(verbose=verbose):
        url, options = find_output(output)
        from fruitdask.core.storage import Location, write_file
        from fruitdask.pipeline.open import open as open_result
        from fruitdask.pipeline.similar import find_similar, list_queries, render_similar

        result = open_result(url, storage_options=options)
        queries = list_queries(result, list(photos), overrides=overrides)
        table = find_similar(result, queries, k=k, metric=metric)
        if html is not None:
            write_file(Location(html), render_similar(result, queries, table, overrides=overrides).encode())
        click.echo(table.to_json(orient="records", indent=2)) if is_json else _print_table(table)
        if html is not None:
            click.echo(f"Wrote {html}", err=True)


def _print_table(table: "pd.DataFrame") -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    printed = Table()
    for name in table:
        printed.add_column(str(name), justify="right" if name in ("rank", "distance") else "left", overflow="fold")
    shown = table.assign(
        query=table["query"].where(table["rank"] == 1, ""), distance=table["distance"].map("{:.4g}".format)
    )
    for row in shown.astype(str).itertuples(index=False):
        printed.add_row(*(escape(show(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    # Paths are not broken where another program reads them.
    console.print(printed)
