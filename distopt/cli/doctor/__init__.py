"""`distopt doctor`: what is wrong with the hosts of a job, asked from each of them before the job runs."""

from distopt.cli.doctor.examination import examine
from distopt.cli.doctor.findings import Finding, judge, status
from distopt.cli.doctor.tables import show
from distopt.cli.doctor.watch import ends_by

__all__ = ["Finding", "ends_by", "examine", "judge", "show", "status"]
