"""Search lambda, learning rate and dropout; train the best configuration with DDP; register it as challenger.

python jobs/tune.py
python jobs/tune.py --preset smoke
ray job submit -- python jobs/tune.py --preset paper tuning.space=search_spaces/wide.yaml tuning.trials=100
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.tuning.settings import TuneSettings, default_preset

    invocation = read_invocation(TuneSettings, __doc__, default_preset=default_preset)
    from emolab.studies.tuning import tune

    invocation.run(tune)


if __name__ == "__main__":
    run_job(main)
