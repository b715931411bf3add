"""Train one model, tracked and resumable.

python jobs/train.py --preset small
python jobs/train.py --preset paper workers.count=4 workers.gpus=1
python jobs/train.py --preset small model.name=edu_emotionnet-tfl training.seed=1
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.training.recipe import TrainSettings

    invocation = read_invocation(TrainSettings, __doc__)
    from emolab.registry.training import train_and_register

    invocation.run(train_and_register)


if __name__ == "__main__":
    run_job(main)
