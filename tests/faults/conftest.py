"""What the fault tests share: the victims' helper process, and where they write down what they tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import REPOSITORY
from tests.faults.killing import Victims
from tests.faults.report import PROPERTY

if TYPE_CHECKING:
    from tests.faults.nodes import Nodes
    from tests.faults.undisturbed import Recordings, Sweep


@pytest.fixture(scope="session")
def victims() -> Victims:
    """Starts jobs that are killed."""
    return Victims(REPOSITORY)


@pytest.fixture(scope="module")
def nodes(ray_cluster: None, victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A cluster of several nodes, none yet but its head."""
    from tests.faults.nodes import Nodes  # it takes seconds to import, and few files need it

    cluster = Nodes(victims, tmp_path_factory.mktemp("nodes"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def planned(ray_cluster: None, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep and what comes out of it where nothing happens."""
    from tests.faults.undisturbed import swept

    return swept(toy_data, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="session")
def recordings(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Recordings and what a preparation makes of them where nothing happens."""
    from tests.faults.undisturbed import prepared

    return prepared(tmp_path_factory.mktemp("recordings"))


@pytest.fixture
def record_faults(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """(area, fault, tried, survived, kills) -> a line of the table that `make faults` ends with."""

    def record(area: str, fault: str, *, tried: int, survived: int, kills: int = 0) -> None:
        counts = {"area": area, "fault": fault, "tried": tried, "survived": survived, "kills": kills}
        record_property(PROPERTY, counts)

    return record
