"""Commands for configurations and sample data: validate, schema, sample."""

import json

import click

from fruitdask.cli.common import config_argument, load_results, reported, set_option


@click.command()
@config_argument
@set_option
def validate(config: str, overrides: tuple[str, ...]) -> None:
    """Check a configuration without reading the data."""
    from fruitdask.worker.models import check_name

    with reported():
        check_name(load_results(config, overrides).model)
        click.echo(f"{config} is valid.")


@click.command()
@click.option("--markdown", is_flag=True, help="Print a reference of all keys for people instead.")
def schema(markdown: bool) -> None:
    """Print the JSON schema of configurations, for editors."""
    from fruitdask.core.config import build_reference, build_schema

    click.echo(build_reference() if markdown else json.dumps(build_schema(), indent=2), nl=not markdown)


@click.command()
@click.argument("folder", type=click.Path())
@click.option("--per-class", default=24, show_default=True, help="Images per class.")
@click.option("--size", "size_px", default=160, show_default=True, help="Side of the images, in pixels.")
@click.option("--seed", default=0, show_default=True, help="Seed of the differences between images.")
def sample(folder: str, per_class: int, size_px: int, seed: int) -> None:
    """Draw a small data set of fruits on a turntable into FOLDER."""
    from fruitdask.core.sample import draw_sample

    with reported():
        n_images = draw_sample(folder, per_class=per_class, size_px=size_px, seed=seed)
        click.echo(f"Drew {n_images} images into {folder}.")
