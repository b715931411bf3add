"""Train one model, tracked and resumable.

python jobs/train.py --preset small
python jobs/train.py --preset paper workers.count=4 workers.gpus=1
python jobs/train.py --preset small model.name=edu_emotionnet-tfl training.seed=1
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.training.recipe import TrainSettings

    settings, dry_run = parse(TrainSettings, sys.argv[1:], description=__doc__ or "")
    from emolab.registry.training import train_and_register  # takes seconds that a mistyped option need not wait

    imports_done()
    train_and_register(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
