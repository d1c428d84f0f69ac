"""The command that shows the page of a run."""

import click

from fruitdask.cli.common import find_output, reported, show


@click.command("open")
@click.argument("output")
def open_(output: str) -> None:
    """Open the page of a run or an exploration in the browser.

    OUTPUT is a folder or URL of results, or the configuration file of the run. The page of a URL is copied to a
    temporary file, which stays until you delete it.
    """
    import webbrowser

    with reported():
        url, options = find_output(output)
        from fruitdask.pipeline.report import fetch_page

        page = fetch_page(url, storage_options=options)
        is_open = webbrowser.open(page.as_uri())
        click.echo(show(f"{'Opened' if is_open else 'Found no browser; open this file yourself:'} {page}"))
