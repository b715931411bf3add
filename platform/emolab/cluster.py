"""Joining or starting Ray, and refusing what the cluster can never run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from pydantic import Field

from emolab.configuration import Settings
from emolab.names import UserError

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


class ClusterSettings(Settings):
    """Which Ray to use."""

    address: str = Field(default="auto", description="auto: RAY_ADDRESS, else a local one; local; or host:port")
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a local cluster; null: all of the machine's")


@contextmanager
def connected(settings: ClusterSettings | None = None) -> Iterator[None]:
    """Ray for the length of a job: the submitted job's or RAY_ADDRESS, else one of our own on loopback."""
    if ray.is_initialized():
        yield
        return
    settings = settings or ClusterSettings()
    _prepare_environment()
    try:
        if settings.address == "auto" and joins_cluster():
            context = ray.init(address=os.environ["RAY_ADDRESS"], **_QUIET)
        elif settings.address in ("auto", "local"):
            context = _start_local(settings)
        else:
            context = ray.init(address=settings.address, **_QUIET)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster at {settings.address!r}: {error}") from None
    if context.dashboard_url:
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{context.dashboard_url}"
    try:
        yield
    finally:
        ray.shutdown()


def require(resources: Mapping[str, float], *, purpose: str) -> None:
    """Refuse a plan the cluster cannot hold; Ray itself would wait for ever.

    Raises:
        UserError: naming every resource that falls short.
    """
    available = ray.cluster_resources()
    short = [
        f"{amount:g} {name} needed, {available.get(name, 0.0):g} in the cluster"
        for name, amount in resources.items()
        if amount > available.get(name, 0.0)
    ]
    if short:
        raise UserError(f"{purpose} cannot run here: {'; '.join(short)}")


def cluster_gpus() -> int:
    """GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def worker_environment() -> dict[str, str]:
    """Environment variables that our tasks and actors need."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    # Tune releases the workers of a stopped trial through the dashboard's API; without its address they stay.
    return {"RAY_API_SERVER_ADDRESS": address} if address else {}


def user_error(error: BaseException) -> BaseException:
    """The user's mistake inside a remote failure, if that is what it was; otherwise the failure itself.

    Ray sends the original exception as text only, once its own wrappers are around it.
    """
    found = _USER_ERROR.search(str(error))
    return UserError(found[1]) if found else error


_USER_ERROR = re.compile(rf"^{re.escape(UserError.__module__)}\.{UserError.__name__}: (.*)$", re.MULTILINE)


def _prepare_environment() -> None:
    os.environ.setdefault("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "120")  # an error instead of a hang
    import ray.data  # half a second that workers do not need

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):  # their progress goes to Ray's own log files
        logging.getLogger(name).setLevel(logging.ERROR)


def joins_cluster() -> bool:
    """Whether ``auto`` joins a cluster rather than starting one.

    Only where RAY_ADDRESS says so, as it does inside a submitted job. Ray's own default also joins whatever cluster
    it finds on the machine, such as somebody's test, and ends with it.
    """
    return bool(os.environ.get("RAY_ADDRESS"))


def _start_local(settings: ClusterSettings) -> Any:
    # Loopback only, and no token: nobody but this machine's users can reach it.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    return ray.init(
        address="local", num_cpus=settings.cpus, include_dashboard=True, dashboard_host="127.0.0.1", **_QUIET
    )
