"""The command that writes a configuration to start from."""

import json
import shlex
from pathlib import Path

import click

from fruitdask.cli.common import describe_photographs, reported, show
from fruitdask.errors import ConfigError

_FILE = "fruitdask.yaml"
#: Without photographs: the folders beside the file, and the setting that draws photographs into the first one.
_PHOTOS, _RESULTS = "photographs", "photographs-results"
_SAMPLE = """
  # Draws photographs of fruits if that folder does not exist. To use your own, name their folder and delete this line.
  sample: {per_class: 24}"""
_TEMPLATE = """\
# Run it: fruitdask run FILE. All settings: fruitdask schema --markdown. Check it: fruitdask validate FILE.
input:
  # A folder with one folder per class, or an archive or a URL of one.
  url: %(url)s%(sample)s
  # The part of a path that names the object a photograph shows, to compare photographs of different objects only.
  # group_from: '(.*/r\\d+)_'
output:
  url: %(results)s
model:
  # A network of keras.applications. Without internet access, name a file with its weights.
  name: MobileNetV2
  weights: imagenet
reduce:
  # The number of principal components, or the fraction of the variance to keep, such as 0.8.
  n_components: 2
  # A second map, which places similar photographs next to each other.
  tsne: {enabled: false}
"""


@click.command()
@click.argument("photos", required=False)
@click.argument("file", default=_FILE)
def init(photos: str | None, file: str) -> None:
    """Write a short configuration file to start from.

    PHOTOS is a folder, an archive or a URL of photographs; without it, the file draws a sample. FILE is
    fruitdask.yaml by default, and is never overwritten.
    """
    with reported():
        _create(Path(file), _TEMPLATE % _describe(photos))
        click.echo(show(f"Wrote {file}. Next: fruitdask run {shlex.quote(file)}"))


def _describe(photos: str | None) -> dict[str, str]:
    """Describe what differs between the files, as YAML."""
    if photos is None:
        return {"url": _PHOTOS, "sample": _SAMPLE, "results": _RESULTS}
    from fruitdask.core.config import load_config

    sections = describe_photographs(photos)
    if sections is None:
        found = "a file" if Path(photos).exists() else "nothing"
        raise ConfigError(f"{photos}: expected a folder, an archive or a URL of photographs, found {found}")
    config = load_config(sections)
    urls = {"url": config.input.url, "results": config.output.url}
    # JSON is YAML.
    return {"sample": ""} | {name: json.dumps(url, ensure_ascii=False) for name, url in urls.items()}


def _create(path: Path, text: str) -> None:
    """Create a file, and never overwrite one."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path}: expected a new file, found one; name another as the second argument") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name another place") from error
