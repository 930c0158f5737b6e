"""What leaves a trained model: its levels, as records, files, tables and pictures. Without Lightning."""

from cpq_lightning.export.clusters import weight_histograms as weight_histograms
from cpq_lightning.export.clusters import write_clusters as write_clusters
from cpq_lightning.export.levels import LevelsRecord as LevelsRecord
from cpq_lightning.export.levels import levels as levels
from cpq_lightning.export.levels import manifest as manifest
from cpq_lightning.export.levels import write_atomically as write_atomically
from cpq_lightning.export.levels import write_levels as write_levels
from cpq_lightning.export.levels import write_manifest as write_manifest
from cpq_lightning.export.plots import TRAJECTORY_FILE as TRAJECTORY_FILE
from cpq_lightning.export.plots import draw_trajectory as draw_trajectory
from cpq_lightning.export.report import CLUSTERS_FILE as CLUSTERS_FILE
from cpq_lightning.export.report import read_manifest as read_manifest
from cpq_lightning.export.report import report_levels as report_levels
from cpq_lightning.export.report import write_report as write_report
from cpq_lightning.export.table import levels_table as levels_table
from cpq_lightning.export.table import metrics_table as metrics_table
from cpq_lightning.export.table import summary as summary
