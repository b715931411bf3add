"""Hold a challenger against the champion and move the alias only if every gate passed.

python jobs/promote.py --model models:/edu-emotionnet@challenger
python jobs/promote.py --evaluate data/edusim-small --gates my-gates.yaml
python jobs/promote.py --dry-run
python jobs/promote.py --model models:/edu-emotionnet --rollback --reason "complaints from the field"

Evidence is read from tracked runs: the result on the test split (--evaluate opens that split, once, for a model that
has none), and a robustness sweep (jobs/robustness.py --suite promotion). Nothing is promoted on missing evidence.

Exit status: 0 promoted (with --dry-run: would be), or rolled back; 1 refused by a gate, the champion stays; 2 nothing
was decided: a mistake of yours in one line, or another promotion was at work or faster; 130 interrupted.
"""

import sys

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.registry.settings import PromoteSettings

    invocation = read_invocation(PromoteSettings, __doc__)
    from emolab.registry.promotion import promote, roll_back

    if invocation.settings.rollback:
        invocation.run(roll_back)
    elif not invocation.run(promote).passed:
        sys.exit(1)


if __name__ == "__main__":
    run_job(main)
