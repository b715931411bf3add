"""The textbook network of the benchmark is the same function, and the benchmark writes what it measured.

Which of them is faster is the benchmark's own figure: a machine that tests run on is too busy for it.
"""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import factorised_sweep
from benchmarks import training_step as benchmark

SMALL = benchmark.Case(sessions=2, steps=12, dropout=0.0, rounds=1, width=16, layers=2)


def test_textbook_and_package_agree_in_loss_and_every_gradient():
    assert max(benchmark.parity(SMALL).values()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--quik"], "error: unrecognized arguments: --quik"),
        (["--case", "126"], "error: no case is named like '126' (cases: G3: one modality missing (P4); "),
    ],
)
def test_a_mistake_in_a_benchmarks_command_line_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        factorised_sweep.main(arguments)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_benchmark_refuses_to_time_networks_that_disagree(monkeypatch):
    attend = benchmark.Textbook.attend
    monkeypatch.setattr(benchmark.Textbook, "attend", lambda self, h, other: attend(self, h, other) * 1.0001)
    with pytest.raises(AssertionError, match="sliced"):
        benchmark.measure(SMALL)


def test_benchmark_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK_CASES", (SMALL,))
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--quick", "--output", str(tmp_path / "out" / "result.json")])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["environment"]["torch"] == torch.__version__
    (measured,) = record["cases"]
    assert measured["repetitions"] == 2
    assert all(found["min"] > 0 and found["median"] > 0 for found in measured["ratio"].values())
