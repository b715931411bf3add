"""Make a data set of session shards, and a report of what is in it.

python jobs/prepare.py --corpus edusim --output data/edusim options.sessions=5000
python jobs/prepare.py --corpus mosi --source path/to/mosi --output data/mosi
python jobs/prepare.py --corpus media --manifest sessions.csv --output data/mine protocol.max_gap_seconds=2
python jobs/prepare.py --preset smoke
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.studies.preparation_settings import PreparationSettings

    invocation = read_invocation(PreparationSettings, __doc__)
    from emolab.studies.preparation import prepare_and_describe

    invocation.run(prepare_and_describe)


if __name__ == "__main__":
    run_job(main)
