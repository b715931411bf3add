"""Write a trained model's streaming step as ONNX for a device, with an int8 variant, and compare both.

python jobs/export.py --model models:/edu-emotionnet@champion --to exported --data data/edusim-small
python jobs/export.py --model runs/my-run --to exported --window 120
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.serving.settings import ExportSettings

    invocation = read_invocation(ExportSettings, __doc__)
    from emolab.serving.device import export

    invocation.run(export)


if __name__ == "__main__":
    run_job(main)
