"""Search lambda, learning rate and dropout; train the best configuration with DDP; register it as challenger.

python jobs/tune.py
python jobs/tune.py --preset smoke
ray job submit -- python jobs/tune.py --preset paper tuning.space=search_spaces/wide.yaml tuning.trials=100
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.tuning.settings import TuneSettings, default_preset

    settings, dry_run = parse(TuneSettings, sys.argv[1:], description=__doc__ or "", default_preset=default_preset)
    from emolab.studies.tuning import tune  # takes seconds that a mistyped option need not wait

    imports_done()
    tune(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
