"""Quantizers as modules: they hold the state, the mathematics is in :mod:`cpq_lightning.functional`."""

from cpq_lightning.nn.observer import RangeObserver as RangeObserver
from cpq_lightning.nn.observer import Usage as Usage
from cpq_lightning.nn.observer import UsageRecorder as UsageRecorder
from cpq_lightning.nn.observer import pool as pool
from cpq_lightning.nn.quantizer import Quantizer as Quantizer
from cpq_lightning.nn.sharding import full_tensor as full_tensor
from cpq_lightning.nn.sharding import is_sharded as is_sharded
from cpq_lightning.nn.watch import Watcher as Watcher
from cpq_lightning.nn.watch import watchers as watchers
