"""What the fault tests share: the victims' helper process, and where they write down what they tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from tests.conftest import REPOSITORY
from tests.faults.killing import Victims
from tests.faults.report import PROPERTY

if TYPE_CHECKING:
    from tests.faults.nodes import Nodes


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


@pytest.fixture
def record_faults(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """(area, fault, tried, survived, kills) -> a line of the table that `make faults` ends with."""

    def record(area: str, fault: str, *, tried: int, survived: int, kills: int = 0) -> None:
        counts = {"area": area, "fault": fault, "tried": tried, "survived": survived, "kills": kills}
        record_property(PROPERTY, counts)

    return record
