"""Clusters of any class of Dask, named by its import path, that start and end with a run."""

import difflib
import inspect
import re
import signal
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from importlib import import_module
from threading import Thread, current_thread, main_thread
from typing import Any

from fruitdask.cluster.closing import close_uninterrupted
from fruitdask.core.config import CustomClusterConfig
from fruitdask.core.storage import hide_secrets
from fruitdask.errors import ClusterStartError, ConfigError

#: A worker ends after a minute without work: a job or a container takes minutes to start.
_ADAPT = {"interval": "5s", "wait_count": 12}
#: How long to wait at the end for a cluster that is still starting, before it is left to the user.
_END_SECONDS = 60


@contextmanager
def open_custom(config: CustomClusterConfig) -> Iterator[Any]:
    """Start a cluster of a class, and close it at the end, whatever happens."""
    build = load_class(config.class_path)
    options = complete_options(build, config)
    stack = ExitStack()
    try:
        yield _connect(config, _start(config, build, options, stack), stack)
    finally:
        close_uninterrupted(stack)


def load_class(path: str) -> Callable[..., Any]:
    """Import a class of clusters, or a function annotated to return one, such as ``distributed.SSHCluster``."""
    from distributed.deploy.cluster import Cluster

    module, _, name = path.rpartition(".")
    try:
        with _kept_interrupts():
            found = getattr(import_module(module), name)
    except ImportError as error:
        package = (error.name or module).partition(".")[0].replace("_", "-")
        raise ConfigError(
            f"cluster.class {path} cannot be imported ({error}); install its package: pip install {package}"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"cluster.class {path}: the module {module} has no {name}; check its name") from error
    kind = _find_class(found)
    if kind is None or not issubclass(kind, Cluster) or kind is Cluster:
        raise ConfigError(
            f"cluster.class {path}: expected a class of clusters of Dask such as dask_jobqueue.SLURMCluster, "
            f"found {_describe(found)}"
        )
    build: Callable[..., Any] = found
    return build


@contextmanager
def _kept_interrupts() -> Iterator[None]:
    """Keep the handler of Ctrl-C: importing dask-jobqueue makes Ctrl-C end the process with exit code 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGINT, handler)


def complete_options(build: Callable[..., Any], config: CustomClusterConfig) -> dict[str, Any]:
    """Add the number of workers to the options of a class, which must fit its signature."""
    options = dict(config.options)
    if "n_workers" in _list_options(build):
        options["n_workers"] = config.n_first
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ConfigError(_describe_misfit(config, build, error)) from error
    return options


def _start(config: CustomClusterConfig, build: Callable[..., Any], options: dict[str, Any], stack: ExitStack) -> Any:
    """Build the cluster in a thread: an interrupted constructor would leave running what it has started."""
    starting: Future[Any] = Future()

    def start() -> None:
        try:
            starting.set_result(build(**options))
        except BaseException as error:
            starting.set_exception(error)

    stack.callback(_close, config, starting)
    Thread(target=start, name="start of the cluster", daemon=True).start()
    try:
        return starting.result(timeout=config.start_timeout)
    except Exception as error:
        if not starting.done():
            raise ClusterStartError(f"{config.name} did not start within {config.start_timeout:g} s") from error
        if any("unexpected keyword argument" in str(cause) for cause in _list_causes(error)):
            raise ConfigError(_describe_misfit(config, build, error)) from error
        raise _say_failed(config, error) from error


def _connect(config: CustomClusterConfig, cluster: Any, stack: ExitStack) -> Any:
    """Connect to a cluster that has at least one worker, and the versions of this machine."""
    from distributed import Client

    from fruitdask.cluster.versions import check_versions

    try:
        client = Client(cluster, timeout=config.start_timeout)
        stack.callback(client.close)
        cluster.scale(config.n_first)
        client.wait_for_workers(1, timeout=config.start_timeout)
    except TimeoutError as error:
        raise ClusterStartError(
            f"{config.name}: no worker within {config.start_timeout:g} s; look for the reason above and "
            "where workers should run, or raise cluster.start_timeout"
        ) from error
    except Exception as error:
        raise _say_failed(config, error) from error
    check_versions(client)
    if config.adaptive:
        cluster.adapt(minimum=config.adaptive.minimum, maximum=config.adaptive.maximum, **_ADAPT)
    return client


def _close(config: CustomClusterConfig, starting: "Future[Any]") -> None:
    """Close a cluster, or report that it may still run."""
    try:
        cluster = starting.result(timeout=_END_SECONDS)
    except Exception as error:
        if starting.done():
            return
        starting.add_done_callback(lambda late: late.exception() or late.result().close())
        raise ClusterStartError(
            f"{config.name} is still starting; fruitdask closes it if it starts while this process runs, otherwise "
            "stop it yourself"
        ) from error
    try:
        cluster.close()
    except Exception as error:
        raise ClusterStartError(
            f"{config.name} may still run: closing it failed ({_explain(error)}); stop it yourself"
        ) from error


def _find_class(build: Any) -> type | None:
    """Return a class, or the annotated return type of a function."""
    try:
        kind = build if isinstance(build, type) else typing.get_type_hints(build).get("return")
    except (NameError, TypeError):
        return None
    return kind if isinstance(kind, type) else None


def _list_options(build: Callable[..., Any]) -> list[str]:
    """List the options of a class by the signatures of its constructors, which hand unknown ones on to others."""
    kind = _find_class(build)
    # Classes of dask_jobqueue hand options on to the class of their jobs.
    kinds = [base for each in (getattr(kind, "job_cls", None), kind) for base in getattr(each, "__mro__", ())]
    builders = [base.__init__ for base in kinds if "__init__" in vars(base) and base is not object]
    named, names = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY), {"self"}
    for builder in (build, *builders):
        parameters = inspect.signature(builder).parameters.values()
        names |= {each.name for each in parameters if each.kind in named}
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters):
            break
    return sorted(names - {"self"})


def _say_failed(config: CustomClusterConfig, error: BaseException) -> ClusterStartError:
    """Make the error for a cluster that did not start: its class may raise anything."""
    return ClusterStartError(f"{config.name} did not start: {_explain(error)}; check cluster.options")


def _describe_misfit(config: CustomClusterConfig, build: Callable[..., Any], error: BaseException) -> str:
    """Describe options that a class does not take, or lacks."""
    names = _list_options(build)
    # The first line, up to a full stop: dask_jobqueue explains itself in a paragraph.
    text = re.split(r"\.?\n|\. ", next(str(cause) for cause in _list_causes(error) if "argument" in str(cause)))[0]
    wrong = "".join(re.findall(r"'(\w+)'", text)[:1])
    near = difflib.get_close_matches(wrong, names, n=1) if wrong not in names else []
    hint = f"did you mean {near[0]}?" if near else f"its options are {', '.join(names)}"
    return f"cluster.options do not fit {config.class_path}: {text}; {hint}"


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _explain(error: BaseException) -> str:
    """Describe the first cause of an error in one line."""
    *_, cause = _list_causes(error)
    return hide_secrets(" ".join(str(cause).split()).rstrip(".") or type(cause).__name__)


def _describe(found: Any) -> str:
    """Describe an object that is not a class of clusters."""
    return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
