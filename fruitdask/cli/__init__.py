"""The command line: parse, call one function, and explain errors in one sentence."""

import atexit
import gc
import io
import os
import sys
from typing import NoReturn

import click

from fruitdask.cli.apply import apply
from fruitdask.cli.check import check
from fruitdask.cli.clusters import clusters
from fruitdask.cli.compare import compare
from fruitdask.cli.erase import erase
from fruitdask.cli.export import export
from fruitdask.cli.init import init
from fruitdask.cli.open import open_
from fruitdask.cli.plan import plan
from fruitdask.cli.policy import iam_policy
from fruitdask.cli.run import explore, report, run
from fruitdask.cli.settings import sample, schema, validate
from fruitdask.cli.similar import similar
from fruitdask.cli.train import predict, train
from fruitdask.cli.verify import verify
from fruitdask.core.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fruitdask")
def cli() -> None:
    """Map a bucket full of photographs: features by a neural network on a Dask cluster, then PCA and t-SNE.

    \b
    Start with:                     fruitdask run PHOTOS
    or, in a clone of the project:  fruitdask run configs/demo.yaml

    Exit codes: 0 success; 1 the run failed, storage failed during the run, or results are damaged; 2 the configuration
    or the command line is wrong, or a path or URL in it cannot be used; 3 too many images failed; 4 refused by a policy
    or a limit; 5 the cluster did not start; 130 interrupted.
    """


_COMMANDS = (
    init,
    run,
    plan,
    explore,
    open_,
    report,
    check,
    similar,
    apply,
    train,
    predict,
    export,
    compare,
    verify,
    erase,
)
_HELPERS = (validate, schema, sample, iam_policy, clusters)
for _command in _COMMANDS + _HELPERS:
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line."""
    # At its end, Python would search all objects for cycles repeatedly: half a second after a run.
    atexit.register(gc.freeze)
    # Print a question mark for a character that the encoding lacks; on standard error, Python escapes it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # Otherwise the processes that it starts would import the user's random.py or types.py in the current folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    cli()
    raise SystemExit(0)
