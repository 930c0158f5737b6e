"""Pure functions on tensors: the mathematics of CPQ and DropBits. Knows nothing of modules or of Lightning."""

from cpq_lightning.functional.allocate import WidthChange as WidthChange
from cpq_lightning.functional.allocate import adjust_widths as adjust_widths
from cpq_lightning.functional.categorical import Estimator as Estimator
from cpq_lightning.functional.categorical import quantize as quantize
from cpq_lightning.functional.categorical import quantize_unchecked as quantize_unchecked
from cpq_lightning.functional.cost import WidthCost as WidthCost
from cpq_lightning.functional.cost import average_bits as average_bits
from cpq_lightning.functional.cost import packed_bytes as packed_bytes
from cpq_lightning.functional.dropbits import expected_bits as expected_bits
from cpq_lightning.functional.dropbits import hard_concrete as hard_concrete
from cpq_lightning.functional.dropbits import keyed_uniform as keyed_uniform
from cpq_lightning.functional.dropbits import logit_of as logit_of
from cpq_lightning.functional.dropbits import masks_from_gates as masks_from_gates
from cpq_lightning.functional.dropbits import open_gates as open_gates
from cpq_lightning.functional.dropbits import open_probability as open_probability
from cpq_lightning.functional.grid import check_bits as check_bits
from cpq_lightning.functional.grid import level_bounds as level_bounds
from cpq_lightning.functional.grid import ring_bounds as ring_bounds
from cpq_lightning.functional.ranges import bin_centers as bin_centers
from cpq_lightning.functional.ranges import fit_step as fit_step
from cpq_lightning.functional.ranges import histogram as histogram
from cpq_lightning.functional.ranges import max_step as max_step
from cpq_lightning.functional.resolution import quantize_resolution as quantize_resolution
from cpq_lightning.functional.schedule import Shape as Shape
from cpq_lightning.functional.schedule import anneal as anneal
from cpq_lightning.functional.schedule import resolve_point as resolve_point
