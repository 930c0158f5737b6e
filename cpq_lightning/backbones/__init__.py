"""Networks by name: timm's, and two that timm lacks. May import attach, optim, nn and below."""

from cpq_lightning.backbones.create import check_name as check_name
from cpq_lightning.backbones.create import create_backbone as create_backbone
from cpq_lightning.backbones.create import known_backbone as known_backbone
from cpq_lightning.backbones.create import pretrained_config as pretrained_config
from cpq_lightning.backbones.weights import plain_weights as plain_weights
from cpq_lightning.backbones.weights import read_weights as read_weights
from cpq_lightning.backbones.weights import under_prefix as under_prefix

__all__ = [
    "check_name",
    "create_backbone",
    "known_backbone",
    "plain_weights",
    "pretrained_config",
    "read_weights",
    "under_prefix",
]
