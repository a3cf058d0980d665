"""A job: described once, attached, resumed, kept in checkpoints and written down.

Limits: what a job does is imported when it is attached (`distopt.job.run`), since it brings the families.
"""

from distopt.job.description import CheckpointSettings, Job, JobSource, LogSettings, from_config

__all__ = ["CheckpointSettings", "Job", "JobSource", "LogSettings", "from_config"]
