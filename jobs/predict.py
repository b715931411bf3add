"""Predict every step of stored sessions; running it again computes only what is missing.

python jobs/predict.py --model models:/edu-emotionnet@champion --data data/edusim-small
python jobs/predict.py --model runs/my-run --data data/edusim-small --splits "[train, validation]"
python jobs/predict.py --model models:/edu-emotionnet/3 --shards recorded/shards --output predicted
python jobs/predict.py --model models:/edu-emotionnet@champion --manifest new.csv options.visual.weights=resnet18.pth
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.serving.batch import PredictSettings, predict

    imports_done()
    settings, dry_run = parse(PredictSettings, sys.argv[1:], description=__doc__ or "")
    predict(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
