"""Follow live sessions: one WebSocket each, and a page that replays a recorded one.

python jobs/serve.py --model models:/edu-emotionnet@champion
python jobs/serve.py --model runs/my-run --demo data/edusim-small --port 8000 --window 300
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.serving.server import ServeSettings, serve_live

    imports_done()
    settings, dry_run = parse(ServeSettings, sys.argv[1:], description=__doc__ or "")
    serve_live(settings, dry_run=dry_run, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_job(main)
