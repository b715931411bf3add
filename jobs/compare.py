"""Train models x seeds, freeze them all, test each once; tables I-III, figures 3, 4 and 6, statistics.

python jobs/compare.py
python jobs/compare.py --preset smoke --models mult,late_fusion,edu_emotionnet
python jobs/compare.py --preset paper --seeds 0,1,2,3,4,5 gpus=0.25
python jobs/compare.py --data data/mosi training.selection=last training.epochs=10

Without a preset or a file this is the small preset: all models, sized for a few CPU cores. Running the same
command again goes on where it stopped; more models or seeds are added to what is there.
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.studies.comparison_settings import CompareSettings, default_preset

    invocation = read_invocation(CompareSettings, __doc__, default_preset=default_preset)
    from emolab.studies.comparison import compare

    invocation.run(compare)


if __name__ == "__main__":
    run_job(main)
