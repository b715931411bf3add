"""deploy/slurm/ray.sbatch: a script that bash and shellcheck accept, and what it starts, in which order, with what.

There is no SLURM here: ``srun``, ``ray`` and ``python`` are stand-ins that write down how they were called.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.deploy.test_containers import tool

SCRIPT = REPOSITORY / "deploy" / "slurm" / "ray.sbatch"
STAND_INS = {
    "hostname": 'if [ $# -gt 0 ]; then echo "fe80::1 192.0.2.1"; else echo node-a; fi',
    "openssl": "echo 0123abcd",
    "srun": 'echo "srun $*" >>"$CALLS"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # As the real one, it ends no sooner than all nodes have started: the script ends them when its job is over.
    "python": """
echo "python $*" >>"$CALLS"
cat >"$CALLS.py"
until [[ $(grep -c '^ray start' "$CALLS") -ge $((SLURM_JOB_NUM_NODES > 1 ? 2 : 1)) ]]; do sleep 0.02; done
[[ $JOB != lonely ]]
""",
    "ray": """
[[ $1 != start ]] || trap 'echo "ended $*" >>"$CALLS"; exit 0' TERM
echo "ray $* mode=$RAY_AUTH_MODE token=$RAY_AUTH_TOKEN" >>"$CALLS"
case "$1 $2" in
  start*) while true; do sleep 0.05; done ;;
  "job submit")
    [[ $JOB == fails ]] && exit 3
    until [[ -e $CALLS.stop ]]; do sleep 0.05; done ;;
  "job stop") touch "$CALLS.stop" ;;
esac
""",
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A folder with the stand-ins."""

    folder: Path

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def start(self, job: str, *, nodes: int) -> subprocess.Popen[str]:
        """The script as SLURM starts it, on the first of some nodes.

        Args:
            job: what becomes of it: ``fails``, ``runs`` until it is stopped, ``lonely`` if the nodes do not join.
        """
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.folder / "calls"), "JOB": job,
            "SLURM_SUBMIT_DIR": str(self.folder), "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SCRIPT), "jobs/tune.py", "--preset", "small", "tracking.uri=http://a b"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o700)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    return Cluster(folder=tmp_path)


def test_bash_and_shellcheck_have_nothing_to_say() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env bash\n")
    checked = subprocess.run([tool("shellcheck"), str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_slurm_is_asked_for_whole_nodes_and_for_a_warning() -> None:
    asked = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--exclusive", "--mem=0", "--ntasks-per-node=1", "--signal=B:TERM@180"} <= set(asked)
    text = SCRIPT.read_text()
    assert text.rindex("#SBATCH") < text.index("set -euo")  # SLURM reads none after the first command


def test_head_and_workers_have_one_token_and_the_status_is_the_jobs(cluster: Cluster) -> None:
    process = cluster.start("fails", nodes=3)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    rays = [call for call in cluster.calls if call.startswith("ray ")]
    assert len(rays) == 3
    assert all(call.endswith("mode=token token=0123abcd") for call in rays)
    head, worker = (next(call for call in rays if part in call) for part in ("--head", "--address=192.0.2.1:6379"))
    assert "--node-ip-address=192.0.2.1 --port=6379 --dashboard-host=127.0.0.1" in head
    assert "--temp-dir=/tmp/ray-77" in head  # another user's /tmp/ray is not to be written
    for call in (head, worker):
        assert "--num-cpus=8 --num-gpus=1" in call and "--block" in call
    assert "-- python jobs/tune.py --preset small tracking.uri=http://a b" in rays[-1]
    assert [call.split(" ray ")[0] for call in sorted(cluster.calls) if call.startswith("srun")] == [
        "srun --nodes=1 --ntasks=1 --cpus-per-task=8 --nodelist=node-a",
        "srun --nodes=2 --ntasks=2 --cpus-per-task=8 --exclude=node-a",
    ]
    assert sum(call.startswith("ended start") for call in cluster.calls) == 2


def test_one_node_is_a_cluster(cluster: Cluster) -> None:
    cluster.start("fails", nodes=1).communicate(timeout=60)
    assert sum(call.startswith("srun") for call in cluster.calls) == 1


def test_the_job_is_submitted_once_all_nodes_have_joined(cluster: Cluster) -> None:
    process = cluster.start("lonely", nodes=2)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert not any("job submit" in call for call in cluster.calls)
    assert "python - 192.0.2.1:6379 2 600" in cluster.calls
    compile((cluster.folder / "calls.py").read_text(), "waiting", "exec")


def test_a_job_whose_time_is_up_is_asked_to_end_before_the_cluster_goes(cluster: Cluster) -> None:
    process = cluster.start("runs", nodes=2)
    while not any("job submit" in call for call in cluster.calls):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    places = [place for place, call in enumerate(cluster.calls) if "job stop" in call or call.startswith("ended start")]
    assert "job stop --address http://127.0.0.1:8265 emolab-77" in cluster.calls[places[0]]
    assert len(places) == 3
