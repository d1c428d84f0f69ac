"""The command that applies a finished run to other images."""

import time

import click

from fruitdask.cli.common import find_output, overwrite_option, prepare_cluster, reported, set_option, verbose_option
from fruitdask.cli.summary import print_summary


@click.command()
@click.argument("output")
@click.option("--input", "source", required=True, metavar="URL", help="Folder or URL of the other images.")
@click.option("--output", "target", required=True, metavar="URL", help="Folder or URL for their results.")
@set_option
@overwrite_option
@click.option("--retry-failed", is_flag=True, help="Retry images that failed in earlier runs.")
@verbose_option
def apply(
    output: str,
    source: str,
    target: str,
    overrides: tuple[str, ...],
    overwrite: bool,
    retry_failed: bool,
    verbose: bool,
) -> None:
    """Compute features of other images as the run in OUTPUT did.

    The network, the decoding and the principal components are those of that run.

    OUTPUT is a folder or URL, or the configuration file of the run, which also gives storage options. The other
    settings are those of that run, unless --set changes them, except that t-SNE, quality and the check are off. Storage
    options and other settings that may hold secrets are not recorded: give them again with --set. The images need no
    labels.

    Run it again after an interruption, or after images were added, changed or removed: it reuses stored results, and
    never fits components again.
    """
    from fruitdask.core.progress import choose_progress

    started = time.perf_counter()
    overrides += ("output.overwrite=true",) if overwrite else ()
    again = "stored results are kept, run the same command again to resume" + ", without --overwrite" * overwrite
    with reported(verbose=verbose, again=again):
        url, options = find_output(output)
        from fruitdask.pipeline.apply import configure, describe_applied
        from fruitdask.pipeline.open import open as open_result
        from fruitdask.pipeline.run import carry_out

        result = open_result(url, storage_options=options)
        config = configure(result, input=source, output=target, overrides=overrides)
        prepare_cluster(config)
        applied = describe_applied(result)
        applied_result = carry_out(config, applied=applied, retry_failed=retry_failed, progress=choose_progress())
        print_summary(applied_result, waited_seconds=time.perf_counter() - started)
