"""What leaves a trained model: its levels, as records, as JSON and as a table. Without Lightning."""

from cpq_lightning.export.levels import LevelsRecord as LevelsRecord
from cpq_lightning.export.levels import levels as levels
from cpq_lightning.export.levels import manifest as manifest
from cpq_lightning.export.levels import write_levels as write_levels
from cpq_lightning.export.table import levels_table as levels_table
from cpq_lightning.export.table import metrics_table as metrics_table
from cpq_lightning.export.table import summary as summary
