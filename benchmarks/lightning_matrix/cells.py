"""All cells, in the order of the table."""

from benchmarks.lightning_matrix import features, optimization, processes
from benchmarks.lightning_matrix.common import CELLS as CELLS

# Imported for the cells that they register.
__all__ = ["CELLS", "features", "optimization", "processes"]
