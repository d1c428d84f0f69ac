"""The notebooks: they run, in short cells that define no functions, and what costs money stays off.

Their outputs are stored. They get the same checks as outputs of a run here, and must be of the same kinds. After
changing a notebook or an output, store them again with ``pytest tests/test_notebooks.py --write-golden``.
"""

import ast
import copy
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.manager import start_new_kernel
from loopback_ec2 import LoopbackEC2
from nbclient import NotebookClient
from runs import EXTRAS

from fruitdask.core.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("00_start", "01_explore", "02_run", "03_map", "04_cloud", "05_answers")
REGION = "eu-west-1"
#: Images of the demo, and here.
N_DEMO_IMAGES, N_IMAGES = 144, 48
#: The folder that stored outputs name, and the largest size of a picture in them.
HOME, MAX_PICTURE_BYTES = "/home/you/fruitdask", 1_000_000
#: Nothing listens there, so each request to AWS fails.
NOWHERE = "http://127.0.0.1:9"
PAGE_NOTE = "<p><i>Run this cell, and the page appears here.</i></p>"
#: When a cluster closes, its scheduler may end before a worker; Dask then logs a traceback that means nothing. On a
#: busy machine, a worker may not end in time.
LAST_WORDS = re.compile(
    r"^\S+ \S+ - distributed\.worker - ERROR - Failed to communicate with scheduler during heartbeat\.$"
    r".*?^\S*CommClosedError: .*?$\n?"
    r"|^\S+ \S+ - distributed\.nanny - WARNING - Worker process still alive after [\d.]+ seconds, killing$\n?",
    re.MULTILINE | re.DOTALL,
)

Execute = Callable[..., nbformat.NotebookNode]


def read(name: str) -> nbformat.NotebookNode:
    """Read a notebook as it is kept."""
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def list_sources(notebook: nbformat.NotebookNode) -> list[str]:
    """List the code cells, magics turned into Python."""
    return [TransformerManager().transform_cell(cell.source) for cell in notebook.cells if cell.cell_type == "code"]


def list_outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """List the outputs of all cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def join_prints(notebook: nbformat.NotebookNode) -> str:
    """Join what the cells have printed."""
    return "".join(output.text for output in list_outputs(notebook) if output.output_type == "stream")


def list_complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """List what the cells have written to standard error, and warnings and tracebacks wherever they are shown."""
    complaints = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", ())
        written = "".join(output.text for output in outputs if output.get("name") == "stderr")
        complaints.append(LAST_WORDS.sub("", written))
        shown = (
            str(output.data) if "data" in output else output.text
            for output in outputs
            if output.get("name") != "stderr"
        )
        complaints += [text for text in shown if re.search(r"Traceback|\w+Warning: ", text)]
    return [complaint for complaint in complaints if complaint.strip()]


def count_pictures(notebook: nbformat.NotebookNode) -> int:
    """Count the images and figures among the outputs."""
    return sum("image/png" in output.get("data", {}) for output in list_outputs(notebook))


@pytest.fixture(scope="module")
def is_written(request: pytest.FixtureRequest) -> bool:
    """Whether to store the outputs, instead of comparing them."""
    return bool(request.config.getoption("--write-golden"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, is_written: bool, squeezenet: ModelConfig) -> Iterator[Path]:
    """A copy of the notebooks and of what they read; Jupyter uses only this folder, its kernel is this interpreter, and
    AWS is out of reach.
    """
    folder = tmp_path_factory.mktemp("clone")
    for name in ("notebooks", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    # A third of the pictures are enough.
    demo = folder / "configs" / "demo.yaml"
    text = demo.read_text()
    assert "sample: {per_class: 24}" in text
    if not is_written:
        demo.write_text(text.replace("per_class: 24", f"per_class: {N_IMAGES // 6}"))
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(variable, str(folder / variable.lower()))
        for variable in (
            "SPEND_MONEY",
            "BUCKET",
            "INSTANCE_PROFILE",
            "DOCKER_IMAGE",
            "CLIENT_CIDR",
            "PHOTOGRAPHS",
            "GROUPS",
        ):
            patch.delenv(f"FRUITDASK_{variable}", raising=False)
        patch.setenv("AWS_ENDPOINT_URL", NOWHERE)
        yield folder


@pytest.fixture(scope="module")
def kernel(workplace: Path) -> Iterator[tuple[Any, Any]]:
    """A kernel and its client; after the first notebook, it has imported what notebooks import."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(workplace / "notebooks"))
    client.allow_stdin = False
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel()


@pytest.fixture
def execute(workplace: Path, is_written: bool, kernel: tuple[Any, Any]) -> Execute:
    """Execute a notebook in the shared folder, where it finds the files of those before it. Its outputs are of the same
    kinds as the stored ones, unless `is_as_stored` is False. It sees no names of those before it, and sees the current
    environment only in its own kernel.
    """

    def run(name: str, *, is_as_stored: bool = True, has_own_kernel: bool = False) -> nbformat.NotebookNode:
        notebook = nbformat.read(workplace / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
        resources = {"metadata": {"path": str(workplace / "notebooks")}}
        # A cell that raises ends this with a CellExecutionError that shows its traceback.
        # Outputs come late on a busy machine.
        settings = {"timeout": 300, "iopub_timeout": 60, "kernel_name": "python3", "resources": resources}
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f\n__spec__ = None"))
        manager, client = (None, None) if has_own_kernel else kernel
        runner = NotebookClient(notebook, km=manager, **settings)
        runner.kc = client
        executed = runner.execute()
        del executed.cells[0]
        assert not list_complaints(executed)
        kept = tidy(executed, workplace)
        if is_as_stored and is_written:
            nbformat.write(kept, ROOT / "notebooks" / f"{name}.ipynb")
        elif is_as_stored:
            assert list_kinds(kept) == list_kinds(read(name)), "store the outputs again: --write-golden"
        return executed

    return run


def tidy(executed: nbformat.NotebookNode, workplace: Path) -> nbformat.NotebookNode:
    """Prepare a notebook for storing: without the page and what differs from run to run."""
    kept = copy.deepcopy(executed)
    kept.metadata = {"kernelspec": kept.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in kept.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                tidy_output(output, workplace)
    return kept


def tidy_output(output: nbformat.NotebookNode, workplace: Path) -> None:
    """Remove the page, the number of a cell, and paths of this machine from an output."""
    output.pop("metadata", None)
    if output.output_type in ("display_data", "execute_result"):
        output.metadata = {}
    if "execution_count" in output:
        output.execution_count = None
    if "text" in output:
        output.text = output.text.replace(str(workplace), HOME)
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and kind.startswith("text/"):
            output.data[kind] = PAGE_NOTE if "<iframe" in value else value.replace(str(workplace), HOME)


def list_kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """List the kinds of each code cell's outputs; what is printed may come in several pieces."""
    kinds = [
        [f"{output.output_type} {output.get('name', '')} {sorted(output.get('data', {}))}" for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [[kind for kind, _ in itertools.groupby(one)] for one in kinds]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_valid_and_its_outputs_are_small(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.kernelspec.name == "python3"
    assert list_outputs(notebook) and not list_complaints(notebook)
    text = json.dumps([output.get("data", output.get("text")) for output in list_outputs(notebook)])
    assert not re.search(r"<iframe|pytest-of-|/root/", text)
    pictures = [output.data["image/png"] for output in list_outputs(notebook) if "image/png" in output.get("data", {})]
    assert max(map(len, pictures), default=0) < MAX_PICTURE_BYTES
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert not any(cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_short_cells_without_functions(name: str) -> None:
    notebook = read(name)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].startswith("%matplotlib inline\n") and "import fruitdask\n" in code[0]
    assert max(len(source.splitlines()) for source in code) < 12
    assert max(len(line) for source in code for line in source.splitlines()) <= 100
    nodes = [node for source in list_sources(notebook) for node in ast.walk(ast.parse(source))]
    assert not [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_explains_and_has_no_broken_links(name: str) -> None:
    texts = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    assert texts[0].startswith(f"# {int(name[:2])}. ") and "## A question to try\n" in texts[-1]
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(texts))
    here = [link for link in links if not link.startswith("https://")]
    assert all((ROOT / "notebooks" / link).is_file() for link in here)


@pytest.mark.slow
def test_00_start(execute: Execute, workplace: Path) -> None:
    for notebook in (execute("00_start"), read("00_start")):
        assert count_pictures(notebook) == 1 and len(list_sources(notebook)) == 5
    assert (workplace / "demo" / "results" / "report.html").is_file()


@pytest.mark.slow
def test_01_explore(execute: Execute, workplace: Path) -> None:
    for notebook in (execute("01_explore"), read("01_explore")):
        by_hand, fruitdask = re.findall(r"^(?:by hand|fruitdask): +(\S+)", join_prints(notebook), re.MULTILINE)
        assert float(by_hand) == pytest.approx(float(fruitdask), rel=1e-6)
        assert count_pictures(notebook) == 6
    assert (workplace / "demo" / "results" / "explore.csv").is_file()


@pytest.mark.slow
def test_05_answers(execute: Execute, workplace: Path) -> None:
    executed = execute("05_answers")
    listed = (workplace / "demo" / "answers" / "results" / "issues.csv").read_text()
    planted = re.findall(r"^planted: (\S+), (\S+), (\S+) (\S+)$", join_prints(executed), re.MULTILINE)[0]
    assert all(f"/{name}," in listed for name in planted)
    for notebook in (executed, read("05_answers")):
        shown = "".join(output.data.get("text/html", "") for output in list_outputs(notebook) if "data" in output)
        assert "unknown" in shown and "held-out images right" in shown
        assert count_pictures(notebook) >= 3


@pytest.mark.slow
def test_02_run(execute: Execute, workplace: Path) -> None:
    executed = execute("02_run")
    pages = [output.data.get("text/html", "") for output in list_outputs(executed) if "data" in output]
    assert sum("<iframe" in page and "Data protection" in page for page in pages) == 1
    assert any("/status" in page for page in pages), "no link to the dashboard"
    for notebook in (executed, read("02_run")):
        prints = join_prints(notebook)
        assert float(re.findall(r"largest difference: (\S+)", prints)[0]) < 1e-3
        assert "images computed this time: 0\n" in prints
    assert (workplace / "demo" / "results" / "report.html").is_file()


@pytest.mark.slow
def test_03_map(execute: Execute, is_written: bool) -> None:
    executed = execute("03_map")
    for notebook, n_images in ((executed, N_DEMO_IMAGES if is_written else N_IMAGES), (read("03_map"), N_DEMO_IMAGES)):
        prints = join_prints(notebook)
        assert float(re.findall(r"largest difference from the table: (\S+)", prints)[0]) < 1e-3
        n_neighbours = 5 * n_images
        n_foreign = int(re.findall(rf"(\d+) of {n_neighbours} neighbours are of another class", prints)[0])
        assert f"{1 - n_foreign / n_neighbours:.3f} of the neighbours" in prints
        assert count_pictures(notebook) == 11


@pytest.mark.slow
def test_04_cloud_spends_nothing_unless_allowed_to(execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("INSTANCE_PROFILE", "DOCKER_IMAGE"):
        monkeypatch.setenv(f"FRUITDASK_{variable}", "there-is-one")
    for notebook in (execute("04_cloud", has_own_kernel=True), read("04_cloud")):
        prints = join_prints(notebook)
        assert "S3 is off and EC2 is off\n" in prints
        assert prints.endswith("to s3://my-bucket/fruitdask-notebook/results\n")


@pytest.mark.slow
@pytest.mark.cloud
@pytest.mark.skipif(sys.platform != "linux", reason="the loopback EC2 needs all of 127.0.0.0/8, and /proc")
def test_04_cloud_on_ec2(execute: Execute, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The slowest stages of a run are left to other notebooks.
    notebook = workplace / "notebooks" / "04_cloud.ipynb"
    text, settings = notebook.read_text(), r"\"reduce\": {\"n_components\": 5, \"tsne\": {\"enabled\": True}}"
    assert text.count(settings) == 1
    off = "".join(rf", \"{name}\": {{\"enabled\": False}}" for name in EXTRAS)
    notebook.write_text(text.replace(settings, r"\"reduce\": {\"n_components\": 5}" + off))
    with LoopbackEC2(region=REGION) as cloud:
        cloud.use(monkeypatch)
        with cloud.client("s3") as s3, cloud.client("iam") as iam:
            s3.create_bucket(Bucket="fruits", CreateBucketConfiguration={"LocationConstraint": REGION})
            iam.create_instance_profile(InstanceProfileName="workers")
        names = {"SPEND_MONEY": "1", "BUCKET": "fruits", "DOCKER_IMAGE": "any", "INSTANCE_PROFILE": "workers"}
        for name, value in {**names, "CLIENT_CIDR": "127.0.0.1/32"}.items():
            monkeypatch.setenv(f"FRUITDASK_{name}", value)
        prints = join_prints(execute("04_cloud", is_as_stored=False, has_own_kernel=True))
        assert "S3 is ON and EC2 is ON\n" in prints
        assert f"{N_IMAGES} images in s3://fruits/fruitdask-notebook/photographs\n" in prints
        assert f"{{'ok': {N_IMAGES}}} in s3://fruits/fruitdask-notebook/results\n" in prints
        assert float(re.findall(r"features of the local files: (\S+)", prints)[0]) < 1e-3
        assert f"{{'ok': {N_IMAGES}}} in s3://fruits/fruitdask-notebook/results-ec2\n" in prints
        expected, actual = (
            float(dollars) for dollars in re.findall(r"^(?:expected|it was): \$(\S+)$", prints, re.MULTILINE)
        )
        assert expected > 0 and actual > 0
        assert prints.endswith("0 machines are still there []\n")
        assert {one.role for one in cloud.instances(None)} == {"scheduler", "worker"}
        assert cloud.wait_until_quiet(60)
