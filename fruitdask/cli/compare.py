"""The command that compares results with those of a Spark job."""

import sys
from typing import TYPE_CHECKING, Any

import click

from fruitdask.cli.common import find_output, print_rows, reported, show, verbose_option

if TYPE_CHECKING:
    from fruitdask.pipeline.compare import Comparison

#: Exit code where the results do not agree, as for damaged ones.
_DISAGREE = 1


@click.command()
@click.argument("output", metavar="CONFIG_OR_OUTPUT")
@click.argument("parquet", metavar="SPARK_PARQUET")
@click.option("--path-column", help="Column of paths; by default path, image_path, file ...")
@click.option("--features-column", help="Column of features; by default features, embedding, vector ...")
@click.option("--scores-column", help="Column of scores; by default pcaFeatures, pca_features, pca ...")
@click.option("--out", metavar="FILE", help="Write the table of all images as .csv or .parquet.")
@verbose_option
def compare(
    output: str,
    parquet: str,
    path_column: str | None,
    features_column: str | None,
    scores_column: str | None,
    out: str | None,
    verbose: bool,
) -> None:
    """Compare features and scores with those of a Spark job.

    CONFIG_OR_OUTPUT is the folder or URL of the results, or the configuration file of the run, which also gives storage
    options; they apply to SPARK_PARQUET too if it is on the same kind of storage. SPARK_PARQUET is a folder, file or
    URL with a column of paths, and features or scores as arrays or as vectors of Spark ML. Images match by the longest
    common ending of their paths that is unique, whatever the prefix (s3a://, dbfs:/ ...).

    The exit code is 0 if all images that could be compared agree, and 1 if some do not or none could be compared.
    Images that are on one side only, or have no features there, are counted and do not change the exit code.
    """
    with reported(verbose=verbose):
        if out is not None and not out.lower().endswith((".csv", ".parquet")):
            raise click.BadParameter(
                f"expected a name that ends with .csv or .parquet, found {out}", param_hint="--out"
            )
        url, options = find_output(output)
        from fruitdask.core.storage import Location
        from fruitdask.pipeline.compare import compare as compare_results, write_comparison

        found = compare_results(
            url,
            parquet,
            path_column=path_column,
            features_column=features_column,
            scores_column=scores_column,
            storage_options=options,
            parquet_options=_choose_options(options, url, parquet),
        )
        if out is not None:
            write_comparison(Location(out, _choose_options(options, url, out)), found)
        _print(found, out)
    sys.exit(0 if found.agrees else _DISAGREE)


def _choose_options(options: dict[str, Any], url: str, other: str) -> dict[str, Any]:
    """Use the storage options of the results for another URL, if both are on the same kind of storage."""
    protocols = {each.split("://")[0].replace("s3a", "s3") if "://" in each else "file" for each in (url, other)}
    return options if len(protocols) == 1 else {}


def _print(found: "Comparison", out: str | None) -> None:
    """Print counts, how far features and scores agree, and the verdict."""
    counts, compared = found.counts, found.table[found.table["status"] == "compared"]
    n_matched = sum(counts.get(status, 0) for status in ("compared", "matched", "failed", "empty"))
    ambiguous = found.table["spark_path"][found.table["status"] == "ambiguous"]
    examples = ", ".join(ambiguous.head(3)) + (" ..." if len(ambiguous) > 3 else "")
    rows = {
        "matched": f"{n_matched:,} images",
        "only in the run": f"{counts.get('only_run', 0):,}",
        "only in Spark": f"{counts.get('only_spark', 0):,}",
        "ambiguous": f"{len(ambiguous):,}: {examples}" if len(ambiguous) else "",
        "repeated paths": f"{counts['duplicate']:,} rows of Spark; only the first of each path is compared"
        * (counts["duplicate"] > 0),
        "failed in the run": f"{counts['failed']:,}" if "failed" in counts else "",
        "empty in Spark": f"{counts['empty']:,} (null, zeros, NaN or another width)" if "empty" in counts else "",
    }
    for name, title in (("cosine", "cosine"), ("relative_error", "relative error")):
        values = compared[name]
        worst = values.min() if name == "cosine" else values.max()
        rows[title] = f"median {values.median():.7g}, worst {worst:.7g}" if len(values) else ""
    for each in found.components.to_dict("records"):
        rows[f"component {each['component']}"] = (
            f"sign {each['sign']:+d}, offset {each['offset']:.5g} (mean @ component {each['expected_offset']:.5g}), "
            f"correlation {each['correlation']:.7f}, relative error {each['relative_error']:.2g}"
        )
    print_rows(rows | {"table": out or ""})
    click.echo(show(found.verdict))
