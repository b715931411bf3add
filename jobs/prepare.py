"""Make a data set of session shards.

python jobs/prepare.py --corpus edusim --output data/edusim options.sessions=5000
python jobs/prepare.py --corpus mosi --source path/to/mosi --output data/mosi
python jobs/prepare.py --preset smoke
"""

import sys
from pathlib import Path

from emolab.cluster import ClusterSettings, connected
from emolab.configuration import parse, run_job
from emolab.sessions.preparation import PrepareSettings, prepare
from emolab.sessions.shards import describe


def main() -> None:
    settings, dry_run = parse(PrepareSettings, sys.argv[1:], description=__doc__ or "")
    corpus = settings.build()
    if dry_run:
        print(f"would write {len(corpus.references())} sessions of {corpus.name} to {settings.output}")
        return
    with connected(ClusterSettings()):
        manifest = prepare(corpus, Path(settings.output), seed=settings.seed, shard_sessions=settings.shard_sessions)
    print(describe(manifest))


if __name__ == "__main__":
    run_job(main)
