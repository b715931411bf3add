"""Rebuild the report of a finished comparison from its tracked runs.

python jobs/report.py --run 0123456789abcdef0123456789abcdef --output report.html
python jobs/report.py --run 0123456789abcdef0123456789abcdef --tables tables tracking.uri=http://tracker:5000
"""

import sys

from emolab.job import imports_done, run_job


def main() -> None:
    from emolab.configuration import parse
    from emolab.studies.report import ReportSettings, write_report

    imports_done()
    settings, dry_run = parse(ReportSettings, sys.argv[1:], description=__doc__ or "")
    if not dry_run:
        write_report(settings, report=print)


if __name__ == "__main__":
    run_job(main)
