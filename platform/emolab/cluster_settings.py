"""Which Ray a job uses, without Ray: options are read before it is imported."""

from __future__ import annotations

import os

from pydantic import Field

from emolab.configuration import Settings


class NodeGroup(Settings):
    """Nodes of one kind that an autoscaled cluster may have."""

    nodes: int = Field(ge=1, le=100_000, description="at most")
    cpus: float = Field(ge=0.0, description="of each node")
    gpus: float = Field(default=0.0, ge=0.0, description="of each node")

    @property
    def resources(self) -> dict[str, float]:
        """Of one node, by Ray's names."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


class ClusterSettings(Settings):
    """Which Ray to use."""

    address: str = Field(default="auto", description="auto: RAY_ADDRESS, else a local one; local; or host:port")
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a local cluster; null: all of the machine's")
    grows_to: tuple[NodeGroup, ...] | None = Field(
        default=None,
        description="most nodes of an autoscaled cluster, such as [{nodes: 8, cpus: 4}, {nodes: 2, cpus: 8, gpus: 1}]; "
        "null: EMOLAB_GROWS_TO, else those that are there",
    )

    @property
    def is_local(self) -> bool:
        """Whether a Ray is started, which never grows."""
        return self.address == "local" or (self.address == "auto" and not joins_cluster())


def joins_cluster() -> bool:
    """Whether ``auto`` joins a cluster rather than starting one.

    Only where RAY_ADDRESS says so, as it does inside a submitted job. Ray's own default also joins whatever cluster
    it finds on the machine, such as somebody's test, and ends with it.
    """
    return bool(os.environ.get("RAY_ADDRESS"))
