"""Joining or starting Ray, and refusing what the cluster can never run."""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import ray
import yaml
from pydantic import TypeAdapter, ValidationError
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emolab.cluster_settings import ClusterSettings, NodeGroup, joins_cluster
from emolab.limits import load_yaml
from emolab.memory import memory_mistake
from emolab.mistakes import first_mistake
from emolab.names import UserError

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextmanager
def connected(settings: ClusterSettings | None = None) -> Iterator[None]:
    """Ray for the length of a job: the submitted job's or RAY_ADDRESS, else one of our own on loopback."""
    if ray.is_initialized():
        with _growing(settings) if settings else nullcontext():
            yield
        return
    settings = settings or ClusterSettings()
    groups = _groups(settings)
    _prepare_environment(progress_seconds=_NODE_SECONDS if groups else _PROGRESS_SECONDS)
    try:
        with _own_sigterm():
            context = _connect(settings)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster at {settings.address!r}: {error}") from None
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster asks for a token ({error.message.split('. ')[0]}): give this process the cluster's own, "
            "in RAY_AUTH_TOKEN or in the file ~/.ray/auth_token"
        ) from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        # A bare Exception is what Ray raises where one of its processes did not come up, with a page of their logs.
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        raise UserError(
            f"Ray did not start ({reason}): the machine may be too busy, run the same command again"
        ) from None
    if context.dashboard_url:
        os.environ[API_SERVER] = f"http://{context.dashboard_url}"
    try:
        with _growing(settings):
            yield
    finally:
        ray.shutdown()


API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Ray's variable that says where the cluster's dashboard answers."""
GROWS_TO = "EMOLAB_GROWS_TO"
"""Variable that says for all jobs of a cluster what ``cluster.grows_to`` says for one: Ray does not tell a job which
nodes its autoscaler may add."""
_PROGRESS_SECONDS = 120.0
_NODE_SECONDS = 1800.0
"""So long may a node take that is asked for: its machine is started, and the image fetched."""
_may_have: ContextVar[tuple[NodeGroup, ...]] = ContextVar("may_have", default=())


@contextmanager
def _growing(settings: ClusterSettings) -> Iterator[None]:
    token = _may_have.set(_groups(settings))
    try:
        yield
    finally:
        _may_have.reset(token)


def _groups(settings: ClusterSettings) -> tuple[NodeGroup, ...]:
    """The nodes that the autoscaler may have; none where Ray is a local one."""
    said = os.environ.get(GROWS_TO)
    if settings.is_local or settings.grows_to is not None or not said:
        return () if settings.is_local else settings.grows_to or ()
    try:
        return TypeAdapter(tuple[NodeGroup, ...]).validate_python(load_yaml(said))
    except yaml.YAMLError:
        reason = "no YAML"
    except ValidationError as error:
        reason = first_mistake(error)
    raise UserError(f"{GROWS_TO}={said[:100]}: {reason}: use a list such as [{{nodes: 8, cpus: 4}}]")


def start_seconds(seconds: float) -> float:
    """How long to wait for a process that takes so many seconds to start where its node is there already."""
    return max(seconds, _NODE_SECONDS) if _may_have.get() else seconds


def _connect(settings: ClusterSettings) -> Any:
    if settings.address == "auto" and joins_cluster():
        return ray.init(address=os.environ["RAY_ADDRESS"], **_QUIET)
    if settings.address in ("auto", "local"):
        return _start_local(settings)
    # Another process's local Ray: without this, Ray would look for it at another address of the machine.
    with _on_loopback() if settings.address.startswith("127.") else nullcontext():
        return ray.init(address=settings.address, **_QUIET)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM did before stays what it does: Ray's own handler, set by ``ray.init``, aborts the process."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:  # None: not set from Python
            signal.signal(signal.SIGTERM, before)


def require(resources: Mapping[str, float], *, purpose: str) -> None:
    """Refuse a plan the cluster cannot hold; Ray itself would wait for ever.

    Raises:
        UserError: naming every resource that falls short.
    """
    available, where = total(), "in the cluster at its largest" if _may_have.get() else "in the cluster"
    short = [
        f"{amount:g} {name} needed, {available.get(name, 0.0):g} {where}"
        for name, amount in resources.items()
        if _parts(amount) > _parts(available.get(name, 0.0))
    ]
    if short:
        raise UserError(f"{purpose} cannot run here: {'; '.join(short)}")


def room(worker: Mapping[str, float], *, purpose: str, count: int = 1) -> int:
    """How many processes with these resources the cluster's nodes hold together; a process does not spread over
    nodes.

    Raises:
        UserError: fewer than ``count``, naming what falls short.
    """
    require({name: count * amount for name, amount in worker.items()}, purpose=purpose)
    fits = fitting(worker)
    if fits >= count:
        return fits
    processors, accelerators = worker.get("CPU", 0.0), worker.get("GPU", 0.0)
    reason = f"the nodes together have room for {fits} of {count}"
    if not fits:
        largest = max(nodes(), key=lambda node: (node.get("GPU", 0.0) >= accelerators, node.get("CPU", 0.0)))
        reason = f"the largest node has {largest.get('CPU', 0.0):g} CPU and {largest.get('GPU', 0.0):g} GPU"
    needs = f"a worker needs {processors:g} CPU and {accelerators:g} GPU of one node"
    raise UserError(f"{purpose} cannot run here: {needs}, and {reason}")


def fitting(worker: Mapping[str, float]) -> int:
    """As ``room``, where none may fit."""
    needs = {name: parts for name, amount in worker.items() if (parts := _parts(amount))}
    return sum(min(_parts(node.get(name, 0.0)) // parts for name, parts in needs.items()) for node in nodes())


def _parts(amount: float) -> int:
    """An amount of a resource in ten-thousandths, as Ray counts it: 1.0 // 0.2 is 4."""
    return round(amount * 10_000)


def free(resources: Mapping[str, float]) -> str:
    """What of these resources nobody holds now, for people."""
    total, available = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{available.get(name, 0.0):g} of {total.get(name, 0.0):g} {name} are free" for name in resources)


def nodes() -> list[dict[str, float]]:
    """Resources of every node that is alive, and of every one that an autoscaler may add."""
    alive: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    to_come = [group.resources for group in _may_have.get() for _ in range(group.nodes)]
    for node in alive:
        known = {name: node[name] for name in ("CPU", "GPU") if node.get(name)}
        if known in to_come:  # has come already
            to_come.remove(known)
    return alive + to_come


def total() -> dict[str, float]:
    """Resources of all ``nodes`` together."""
    each = nodes()
    return {name: sum(node.get(name, 0.0) for node in each) for name in {name for node in each for name in node}}


def cluster_gpus() -> int:
    """GPUs of the connected cluster."""
    return int(total().get("GPU", 0))


def on_every_node(function: Callable[..., Answer], *arguments: Any) -> list[tuple[str, Answer]]:
    """Name and answer of every other node that runs work; a node that is too busy to answer is left out."""
    here = ray.get_runtime_context().get_node_id()
    others = {n["NodeID"]: n["NodeName"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")}
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments): name
        for node, name in others.items()
        if node != here
    }
    answered = ray.wait([*asked], num_returns=len(asked), timeout=_ANSWER_SECONDS)[0] if asked else []
    answers: list[tuple[str, Answer]] = []
    for call in answered:
        with suppress(RayError):  # the node is gone meanwhile
            answers.append((asked[call], ray.get(call)))
    return answers


Answer = TypeVar("Answer")
_ANSWER_SECONDS = 30.0


def worker_environment() -> dict[str, str]:
    """Environment variables that our tasks and actors need."""
    address = os.environ.get(API_SERVER)
    # Tune releases the workers of a stopped trial through the dashboard's API; without its address they stay.
    return {API_SERVER: address} if address else {}


def user_error(error: BaseException) -> BaseException:
    """The user's mistake inside a remote failure, if that is what it was, such as a model too large for the memory;
    otherwise the failure itself.

    Ray sends the original exception as text only, once its own wrappers are around it.
    """
    names = "|".join(re.escape(f"{kind.__module__}.{kind.__name__}") for kind in _kinds(UserError))
    found = re.search(rf"^(?:{names}): (.*)$", str(error), re.MULTILINE)
    return UserError(found[1]) if found else memory_mistake(error) or error


def _kinds(error: type[UserError]) -> Iterator[type[UserError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _kinds(kind)


def _prepare_environment(*, progress_seconds: float) -> None:
    """
    Args:
        progress_seconds: after so long without progress Ray Data ends with an error.
    """
    os.environ.setdefault("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", f"{progress_seconds:.0f}")  # instead of a hang
    # Tune's own handler ends its loop as if all trials were done, and the job would go on with what there is.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    import ray.data  # half a second that workers do not need

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):  # their progress goes to Ray's own log files
        logging.getLogger(name).setLevel(logging.ERROR)


def _start_local(settings: ClusterSettings) -> Any:
    """A Ray that nobody reaches from outside this machine, and on it nobody without its token."""
    # Where nothing else is said, Ray asks for a token, and would write one that it has to make into this file.
    if not (_TOKEN_PLACES & os.environ.keys() or _TOKEN_FILE.expanduser().exists()):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this process and those it starts
    constants: Any = importlib.import_module("ray._private.ray_constants")  # holds what the variable was at first
    constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S = max(constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S, _DASHBOARD_SECONDS)
    with _on_loopback():
        return ray.init(
            address="local", num_cpus=settings.cpus, include_dashboard=True, dashboard_host="127.0.0.1", **_QUIET
        )


_DASHBOARD_SECONDS = 300
"""On a machine full of other work the dashboard's imports alone take longer than the minute that Ray waits for it."""
_TOKEN_PLACES = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
_TOKEN_FILE = Path("~/.ray/auth_token")
_NODE_HAS_AN_ADDRESS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray that is started in this block listens on 127.0.0.1 alone.

    Ray listens on every interface unless it takes its node for one that no other can reach, as it does on macOS and
    Windows; ``dashboard_host`` is about the dashboard only, and ``_node_ip_address="127.0.0.1"`` is replaced by
    another address of the machine.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")  # holds what the variable was at first
    before = constants.ENABLE_RAY_CLUSTER, os.environ.get(_NODE_HAS_AN_ADDRESS)
    constants.ENABLE_RAY_CLUSTER, os.environ[_NODE_HAS_AN_ADDRESS] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[0]
        if before[1] is None:
            del os.environ[_NODE_HAS_AN_ADDRESS]
        else:
            os.environ[_NODE_HAS_AN_ADDRESS] = before[1]
