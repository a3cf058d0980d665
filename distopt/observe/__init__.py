"""What is written about a run: lines of JSON, events for TensorBoard, and a report at its end."""

from distopt.observe.lines import Line, read_folder, read_lines
from distopt.observe.recorder import Observed, Recorder, record
from distopt.observe.report import report
from distopt.observe.round_log import RoundLog

__all__ = ["Line", "Observed", "Recorder", "RoundLog", "read_folder", "read_lines", "record", "report"]
