"""Training the quantizers' parameters beside an optimizer that was built without them."""

from cpq_lightning.optim.beside import Beside as Beside
from cpq_lightning.optim.bound import UpdateBound as UpdateBound
from cpq_lightning.optim.companion import Companion as Companion
from cpq_lightning.optim.gates import Budget as Budget
from cpq_lightning.optim.gates import GateTrainer as GateTrainer
from cpq_lightning.optim.groups import holds_parameters as holds_parameters
from cpq_lightning.optim.groups import release as release
from cpq_lightning.optim.pull import GridPull as GridPull
