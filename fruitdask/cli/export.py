"""The command that writes results in the format of another program."""

import click

from fruitdask.cli.common import find_output, reported, show, verbose_option

#: How to open what was written.
_OPEN = {
    "embedding-atlas": "embedding-atlas {target} --x projection_x --y projection_y",
    "tensorboard": "tensorboard --logdir {target}, then choose Projector",
    "fiftyone": "fiftyone datasets create --dataset-dir {target} --type fiftyone.types.FiftyOneDataset",
}


@click.command()
@click.argument("output")
@click.argument("target")
@click.option(
    "--to",
    default="parquet",
    show_default=True,
    metavar="FORMAT",
    help="parquet, embedding-atlas, tensorboard, fiftyone, lance or spark.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@verbose_option
def export(output: str, target: str, to: str, overwrite: bool, verbose: bool) -> None:
    """Write the table and the features for another program.

    OUTPUT is the folder or URL of a finished run, or its configuration file, which also gives storage options; they
    apply to TARGET too if that has the same protocol. TARGET is a file for parquet and embedding-atlas, else a folder;
    for parquet and spark it may be a URL.

    tensorboard and embedding-atlas leave out images without features. FiftyOne shows only images on a local disk: if
    the input is elsewhere, copy it, and pass the folder of the copy to FiftyOne as rel_dir.
    """
    with reported(verbose=verbose):
        url, options = find_output(output)
        from fruitdask.pipeline.export import export as export_results

        is_alike = "://" in target and url.split("://")[0] == target.split("://")[0]
        n_written = export_results(
            url, target, to, overwrite=overwrite, storage_options=options, target_options=options if is_alike else None
        )
        click.echo(show(f"Wrote {n_written:,} images to {target}"))
        if to in _OPEN:
            click.echo(show(f"Open them: {_OPEN[to].format(target=target)}"))
