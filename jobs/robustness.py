"""Evaluate trained models under missing and noisy modalities.

python jobs/robustness.py --model models:/edu-emotionnet@challenger --suite paper
python jobs/robustness.py --model runs/my-run --suite standard --data data/edusim-small
python jobs/robustness.py --model "[COMPARISON_RUN_ID, runs:/OTHER_ID]" --suite paper
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.studies.robustness_settings import RobustnessSettings

    invocation = read_invocation(RobustnessSettings, __doc__)
    from emolab.studies.robustness import robustness

    invocation.run(robustness)


if __name__ == "__main__":
    run_job(main)
