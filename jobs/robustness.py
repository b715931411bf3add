"""Evaluate trained models under missing and noisy modalities.

python jobs/robustness.py --model models:/edu-emotionnet@challenger --suite paper
python jobs/robustness.py --model runs/my-run --suite standard --data data/edusim-small
python jobs/robustness.py --model "[COMPARISON_RUN_ID, runs:/OTHER_ID]" --suite paper
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.studies.robustness import RobustnessSettings, robustness

    imports_done()
    settings, dry_run = parse(RobustnessSettings, sys.argv[1:], description=__doc__ or "")
    robustness(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
