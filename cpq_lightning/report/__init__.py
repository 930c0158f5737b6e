"""Levels of each layer as records, files, tables and plots; comparison of runs. May import packing and below."""

from cpq_lightning.report.levels import LevelsRecord as LevelsRecord
from cpq_lightning.report.levels import levels as levels
from cpq_lightning.report.levels import write_levels as write_levels
from cpq_lightning.report.runs import compare_runs as compare_runs
from cpq_lightning.report.runs import read_run as read_run

__all__ = ["LevelsRecord", "compare_runs", "levels", "read_run", "write_levels"]
