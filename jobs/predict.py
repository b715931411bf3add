"""Predict every step of stored sessions; running it again computes only what is missing.

python jobs/predict.py --model models:/edu-emotionnet@champion --data data/edusim-small
python jobs/predict.py --model runs/my-run --data data/edusim-small --splits "[train, validation]"
python jobs/predict.py --model models:/edu-emotionnet/3 --shards recorded/shards --output predicted
python jobs/predict.py --model models:/edu-emotionnet@champion --manifest new.csv options.visual.weights=resnet18.pth
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.serving.settings import PredictSettings

    invocation = read_invocation(PredictSettings, __doc__)
    from emolab.serving.batch import predict

    invocation.run(predict)


if __name__ == "__main__":
    run_job(main)
