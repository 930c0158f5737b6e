"""Getting the quantizers' parameters trained by an optimizer that was built without them."""

from cpq_lightning.optim.beside import Beside as Beside
from cpq_lightning.optim.bound import UpdateBound as UpdateBound
from cpq_lightning.optim.companion import Companion as Companion
from cpq_lightning.optim.gates import Budget as Budget
from cpq_lightning.optim.gates import GateTrainer as GateTrainer
from cpq_lightning.optim.groups import adopt as adopt
from cpq_lightning.optim.groups import release as release
from cpq_lightning.optim.groups import takes_quantizers as takes_quantizers
from cpq_lightning.optim.pull import GridPull as GridPull
