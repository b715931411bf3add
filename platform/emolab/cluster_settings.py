"""Which Ray a job uses, without Ray: options are read before it is imported."""

from __future__ import annotations

import os

from pydantic import Field

from emolab.configuration import Settings


class ClusterSettings(Settings):
    """Which Ray to use."""

    address: str = Field(default="auto", description="auto: RAY_ADDRESS, else a local one; local; or host:port")
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a local cluster; null: all of the machine's")


def joins_cluster() -> bool:
    """Whether ``auto`` joins a cluster rather than starting one.

    Only where RAY_ADDRESS says so, as it does inside a submitted job. Ray's own default also joins whatever cluster
    it finds on the machine, such as somebody's test, and ends with it.
    """
    return bool(os.environ.get("RAY_ADDRESS"))
