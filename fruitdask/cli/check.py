"""The command that lists photographs to check."""

from typing import TYPE_CHECKING

import click

from fruitdask.cli.common import find_output, reported, show, verbose_option

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 20


@click.command()
@click.argument("output")
@click.option("--kind", "kinds", multiple=True, help="List only issues of this kind, such as label. Repeatable.")
@click.option("-n", "n_shown", default=_SHOWN, show_default=True, help="Issues to list; 0 lists all.")
@verbose_option
def check(output: str, kinds: tuple[str, ...], n_shown: int, verbose: bool) -> None:
    """List the photographs that a person should look at.

    The most serious come first: labels that are probably wrong, copies, near duplicates in several classes or splits,
    outliers, and photographs that are blurry, dark, bright, of one colour or of an unusual size or shape.

    OUTPUT is the folder or URL of a finished run, or its configuration file. The whole list is in issues.csv there.
    """
    with reported(verbose=verbose):
        url, options = find_output(output)
        from fruitdask.analysis.issues import KINDS
        from fruitdask.pipeline.check import check as check_output

        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}", param_hint="--kind")
        issues = check_output(url, storage_options=options)
        chosen = issues[issues["kind"].isin(kinds or KINDS)]
        _print(chosen, n_shown or len(chosen))


def _print(issues: "pd.DataFrame", n_shown: int) -> None:
    """Print issues, one line each."""
    for issue in issues.head(n_shown).to_dict("records"):
        other = f"  like {issue['other']}" if issue["other"] else ""
        suggestion = f"  probably {issue['suggestion']}" if issue["suggestion"] else ""
        kind = issue["kind"].replace("_", " ")
        click.echo(show(f"{kind:<14} {issue['score']:.2f}  {issue['path']}{suggestion}{other}"))
    if issues.empty:
        click.echo("Nothing to check.")
    elif len(issues) > n_shown:
        click.echo(f"... and {len(issues) - n_shown:,} more; -n 0 lists all")
