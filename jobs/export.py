"""Write a trained model's streaming step as ONNX for a device, with an int8 variant, and compare both.

python jobs/export.py --model models:/edu-emotionnet@champion --to exported --data data/edusim-small
python jobs/export.py --model runs/my-run --to exported --window 120
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.serving.device import ExportSettings, export

    imports_done()
    settings, dry_run = parse(ExportSettings, sys.argv[1:], description=__doc__ or "")
    export(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
