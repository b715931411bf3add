"""Make a data set of session shards, and a report of what is in it.

python jobs/prepare.py --corpus edusim --output data/edusim options.sessions=5000
python jobs/prepare.py --corpus mosi --source path/to/mosi --output data/mosi
python jobs/prepare.py --corpus media --manifest sessions.csv --output data/mine protocol.max_gap_seconds=2
python jobs/prepare.py --preset smoke
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.sessions.shards import describe
    from emolab.studies.preparation import PreparationSettings, prepare_and_report

    imports_done()
    settings, dry_run = parse(PreparationSettings, sys.argv[1:], description=__doc__ or "")
    if dry_run:
        corpus = settings.build()
        corpus.provenance()  # weights that are missing are told now
        print(f"would write {len(corpus.references())} sessions of {corpus.name} to {settings.output}")
        return
    print(describe(prepare_and_report(settings, report=lambda line: print(line, flush=True))))


if __name__ == "__main__":
    run_job(main)
