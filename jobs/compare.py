"""Train models x seeds, freeze them all, test each once; tables I-III, figures 3, 4 and 6, statistics.

python jobs/compare.py
python jobs/compare.py --preset smoke --models mult,late_fusion,edu_emotionnet
python jobs/compare.py --preset paper --seeds 0,1,2,3,4,5 gpus=0.25
python jobs/compare.py --data data/mosi training.selection=last training.epochs=10

Without a preset or a file this is the small preset: all models, sized for a few CPU cores. Running the same
command again goes on where it stopped; more models or seeds are added to what is there.
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.studies.comparison import compare
    from emolab.studies.comparison_settings import CompareSettings, with_default_preset

    imports_done()
    settings, dry_run = parse(CompareSettings, with_default_preset(sys.argv[1:]), description=__doc__ or "")
    compare(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
