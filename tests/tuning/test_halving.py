"""Who goes on from which rung: the decisions, and searches that pause and go on."""

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from emolab.tuning.halving import Halving, halving_epochs, places


def in_rounds(curves: Sequence[Sequence[float]], rungs: Sequence[int], factor: int) -> list[int]:
    """Textbook: the epochs of every trial when each round waits for all of the round before."""
    epochs, alive = [0] * len(curves), list(range(len(curves)))
    for rung, count in zip(rungs, places(len(curves), rungs=len(rungs), factor=factor), strict=True):
        for trial in alive:
            epochs[trial] = rung
        alive = sorted(alive, key=lambda trial: (-curves[trial][rung - 1], trial))[:count]
    for trial in alive:
        epochs[trial] = len(curves[0])
    return epochs


def driven(
    curves: Sequence[Sequence[float]], rungs: Sequence[int], factor: int, processes: int, order: int
) -> list[int]:
    """The same by ``Halving``, with processes that answer in an order of their own."""
    trials, chance = len(curves), random.Random(order)
    halving = Halving(rungs, factor=factor, trials=trials)
    epochs, begun, busy = [0] * trials, 0, list[int]()
    while True:
        while len(busy) < processes:
            if begun < trials:
                halving.begin(begun)
                busy.append(begun)
                begun += 1
            elif (number := halving.go_on(0)) is not None:
                busy.append(number)
            else:
                break
        if not busy:
            assert not halving.paused()
            return epochs
        number = busy.pop(chance.randrange(len(busy)))
        epochs[number] = next((rung for rung in rungs if rung > epochs[number]), len(curves[0]))
        if epochs[number] == len(curves[0]):
            halving.end(number)
        else:
            halving.pause(number, epochs[number], curves[number][epochs[number] - 1])
        for hopeless in halving.hopeless():
            halving.end(hopeless)


@settings(max_examples=150, deadline=None)
@given(
    trials=st.integers(1, 30),
    factor=st.integers(2, 4),
    processes=st.integers(1, 8),
    order=st.integers(0, 2**16),
    levels=st.integers(1, 30),
)
def test_any_order_of_answers_gives_the_decisions_of_rounds(
    trials: int, factor: int, processes: int, order: int, levels: int
) -> None:
    rungs, epochs = [1, factor, factor**2], factor**3
    chance = random.Random(order)
    curves = [[chance.randrange(levels) / levels for _ in range(epochs)] for _ in range(trials)]
    found = driven(curves, rungs, factor, processes, order)
    assert found == in_rounds(curves, rungs, factor)
    assert sum(found) == halving_epochs(trials, rungs, factor=factor, epochs=epochs)


def test_a_ninth_of_the_epochs_and_always_one_trial_that_ends() -> None:
    assert places(27, rungs=3, factor=3) == [9, 3, 1]
    assert halving_epochs(27, [1, 3, 9], factor=3, epochs=27) == 27 * 27 // 9
    assert places(4, rungs=3, factor=3) == [1, 1, 1]
    assert halving_epochs(5, [], factor=3, epochs=6) == 30


def test_a_trial_that_fails_leaves_its_place_to_another_unless_it_had_taken_it() -> None:
    halving = Halving([1], factor=2, trials=4)
    for number in range(4):
        halving.begin(number)
    halving.pause(0, 1, 0.1)
    halving.pause(1, 1, 0.2)
    assert halving.go_on(0) is None, "both that are left may be better"
    halving.end(2)
    assert halving.go_on(0) == 1
    halving.pause(3, 1, 0.05)
    assert halving.hopeless() == [3]
    halving.end(1)  # it fails later on: its place is gone
    assert halving.go_on(0) == 0
    assert halving.go_on(0) is None


def test_a_place_that_a_trial_had_taken_before_it_failed_stays_taken_after_a_restart() -> None:
    """It failed before it had finished an epoch beyond the rung."""
    unbroken, resumed = (Halving([1], factor=2, trials=4) for _ in range(2))
    for number in range(4):
        unbroken.begin(number)
        unbroken.pause(number, 1, 0.1 * number)
    assert unbroken.go_on(0) == 3
    unbroken.end(3)
    resumed.count_ended(1, failed=True)
    for number in range(3):
        resumed.pause(number, 1, 0.1 * number)
    for halving in (unbroken, resumed):
        assert [halving.go_on(0), halving.go_on(0)] == [2, None]
