"""Follow live sessions: one WebSocket each, and a page that replays a recorded one.

python jobs/serve.py --model models:/edu-emotionnet@champion
python jobs/serve.py --model runs/my-run --demo data/edusim-small --port 8000 --window 300
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.serving.settings import ServeSettings

    invocation = read_invocation(ServeSettings, __doc__)
    from emolab.serving.server import serve_live

    invocation.run(serve_live)


if __name__ == "__main__":
    run_job(main)
