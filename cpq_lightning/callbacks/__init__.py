"""Lightning callbacks, one a file. None of them imports another."""

from cpq_lightning.callbacks.cpq import CPQCallback as CPQCallback
from cpq_lightning.callbacks.dropbits import DropBitsSchedule as DropBitsSchedule
from cpq_lightning.callbacks.temperature import TemperatureSchedule as TemperatureSchedule
