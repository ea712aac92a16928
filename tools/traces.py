"""What the tools read of a run: its traces, and the newest run of a logger's folder."""

from taperlit.report.locate import find_run as last_run
from taperlit.report.traces import read_traces as scalars

__all__ = ["last_run", "scalars"]
