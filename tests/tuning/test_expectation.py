"""The epochs that a search is said to take are those that its scheduler takes."""

import time
from typing import Any

import numpy as np
import pytest

from emolab.tuning.expectation import Expected, expected_epochs
from emolab.tuning.methods import rungs


def expected(scheduler: Any, *, epochs: int, grace: int = 2, **more: int) -> Expected:
    rule = {"grace": grace, "factor": 3, "epochs": epochs}
    return expected_epochs(scheduler, rungs=rungs(scheduler, **rule), **rule, **more)


def asha_alone(trials: int, epochs: int, places: list[int], generator: np.random.Generator) -> int:
    """The rule as it is written down: at a rung goes on who is among the best third of those that have come there."""
    arrived: dict[int, list[float]] = {place: [] for place in places}
    taken = 0
    for _ in range(trials):
        ability, reached = generator.normal(), epochs
        for place in places:
            score = ability + 0.75 * generator.normal()
            arrived[place].append(score)
            if score < sorted(arrived[place], reverse=True)[max(0, len(arrived[place]) // 3 - 1)]:
                reached = place
                break
        taken += reached
    return taken


@pytest.mark.parametrize(("trials", "epochs"), [(12, 12), (40, 18), (40, 50)])
def test_asha_is_expected_to_take_what_its_rule_takes_and_not_a_third_at_each_rung(trials: int, epochs: int) -> None:
    places = rungs("asha", grace=2, factor=3, epochs=epochs)
    generator = np.random.default_rng(1)
    taken = [asha_alone(trials, epochs, places, generator) for _ in range(400)]
    told = expected("asha", epochs=epochs, trials=trials)
    assert told.simulations == 20
    assert told.least < told.mean < told.most
    assert told.mean == pytest.approx(np.mean(taken), abs=4 * np.std(taken) / 20**0.5)
    thirds = trials * sum((b - a) / 3**n for n, (a, b) in enumerate(zip([0, *places], [*places, epochs], strict=True)))
    assert told.mean > thirds


def test_epochs_that_no_score_decides_are_known() -> None:
    assert expected("none", epochs=27, trials=4, ended=1) == Expected(mean=81, least=81, most=81, simulations=0)
    assert expected("asha", epochs=27, trials=4, ended=4).mean == 0
    assert expected("asha", epochs=27, trials=4, ended=9).mean == 0
    assert expected("asha", epochs=27, trials=1).mean == 27  # the first trial meets nobody


def test_what_a_resumed_search_has_behind_it_is_not_expected_again() -> None:
    """The first trials meet few rivals, so that the second half takes less than the first."""
    whole, half = (expected("asha", epochs=27, trials=40, ended=ended) for ended in (0, 20))
    assert 20 * 2 < half.mean < 0.5 * whole.mean


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_an_expectation_is_the_same_again_and_comes_soon_however_large_the_search(scheduler: str) -> None:
    started = time.process_time()
    for trials, at_once in ((30, 4), (100_000, 64)):
        told = expected(scheduler, epochs=60, trials=trials, at_once=at_once)
        assert expected(scheduler, epochs=60, trials=trials, at_once=at_once) == told
        assert 2 * trials < told.mean < 60 * trials
    assert time.process_time() - started < 60
