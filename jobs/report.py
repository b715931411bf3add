"""Rebuild the report of a finished comparison from its tracked runs.

python jobs/report.py --run 0123456789abcdef0123456789abcdef --output report.html
python jobs/report.py --run 0123456789abcdef0123456789abcdef --tables tables tracking.uri=http://tracker:5000
"""

from emolab.job import run_job


def main() -> None:
    from emolab.invocation import read_invocation
    from emolab.studies.report_settings import ReportSettings

    invocation = read_invocation(ReportSettings, __doc__)
    from emolab.studies.report import write_report

    invocation.run(write_report)


if __name__ == "__main__":
    run_job(main)
