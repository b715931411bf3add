"""What the ``emolab`` command tells and with which status it ends, from its arguments to its result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.ports import free_port

from emolab import doctor
from emolab.__main__ import main
from emolab.doctor import Finding
from emolab.sessions.manifest import read_manifest
from emolab.tracking.buffered import BufferedTracker


def status_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_verify_names_a_data_set_that_is_whole_and_refuses_one_with_a_changed_byte(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    assert status_of("verify", str(data)) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == f"digest {read_manifest(data).digest[:16]}"
    assert told.err == ""
    shard = data / read_manifest(data).split_shards("validation")[0].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert status_of("verify", str(data)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"error: shard {shard} is damaged: ")


def test_deliver_says_what_still_waits_by_its_status_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    tracker = BufferedTracker(address, "x", output=tmp_path)
    tracker.start("r")
    waiting = tracker.close()
    assert waiting
    capfd.readouterr()
    assert status_of("deliver", str(tmp_path), "--uri", address) == 1
    assert f"0 records sent, {waiting} wait: connection refused" in capfd.readouterr().out
    assert status_of("deliver", str(tmp_path / "elsewhere"), "--uri", address) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'elsewhere'} has no outbox")


@pytest.mark.parametrize("good", [True, False])
def test_the_doctors_status_is_that_of_what_it_found(
    good: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding(topic="disk", good=True, detail="room"), Finding(topic="plan", good=good, detail="two CPUs")]
    monkeypatch.setattr(doctor, "examine", lambda preset: found if preset == "smoke" else [])
    assert status_of("doctor", "--preset", "smoke") == (0 if good else 1)
    told = capsys.readouterr().out
    assert "two CPUs" in told and ("!!" in told) is not good
