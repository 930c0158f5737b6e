"""What a run is: a method at a width, with a seed, at a scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """How much is trained, and what.

    Attributes:
        name: In rows and tables.
        images: The first so many of the training images.
        epochs: Of every run.
        start_epochs: Of the full-precision network that all runs start from.
        network: Which it is.
        start_rate: Learning rate of the full-precision start.
        rates: Learning rates that each family's is chosen from, in place of :data:`RATES`.
        seeds: Seeds of the runs.
        searched: Bits of weights and of activations that learning rates are searched at.
        rate_each_width: Whether each of these widths has the rate that is best there, instead of the best one on
            average: for a network where they lie far apart.
    """

    name: str
    images: int
    epochs: int
    start_epochs: int
    network: str = "resnet"
    start_rate: float = 0.004
    rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    searched: tuple[tuple[int, int], ...] = ((2, 2), (4, 4))
    rate_each_width: bool = False


SCALES = {
    "20k": Scale("20k", 20_000, 4, 12),
    "60k": Scale("60k", 60_000, 4, 12),
    "20k-separable": Scale("20k-separable", 20_000, 4, 12, "separable"),
    "10k-silu": Scale("10k-silu", 10_000, 4, 12, "silu", searched=((3, 3),)),
    # The best rate of 2 bits is the highest of the usual ones, or beyond; that of 4 bits is lower.
    "10k-mobile": Scale(
        "10k-mobile",
        10_000,
        4,
        12,
        "mobile",
        rates=(0.001, 0.002, 0.004, 0.008, 0.016),
        searched=((3, 3), (2, 2), (4, 4)),
        rate_each_width=True,
    ),
    "10k-convnext": Scale("10k-convnext", 10_000, 4, 12, "convnext", searched=((3, 3), (2, 2))),
    # Pretrained on ImageNet: a smaller rate, one for all methods, and few runs, which are long.
    "5k-efficientnet": Scale("5k-efficientnet", 5_000, 3, 3, "efficientnet", 0.001, (0.0005,), (0, 1, 2)),
    # For tests: a campaign in seconds, with figures that mean nothing.
    "tiny": Scale("tiny", 256, 2, 1),
}
BATCH_SIZE = 128
# Rates are chosen by runs of a seed of their own, on images that nothing is measured on.
SEARCH_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
RATES = (0.001, 0.002, 0.004, 0.008)
# Of the weights alone, decoupled (AdamW).
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        scale: Name of the :class:`Scale`.
        method: Name of the method.
        weight_bits: Average bits of the weights, first and last layer aside; 32 in full precision.
        act_bits: Bits of the activations.
        seed: Of the order of images, the augmentation, and all that the method draws.
        rate: A learning rate to try in the search; ``None`` is the one that the search has chosen.
    """

    scale: str
    method: str
    weight_bits: float
    act_bits: int
    seed: int
    rate: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells finished runs from others."""
        return (self.scale, self.method, float(self.weight_bits), self.act_bits, self.seed, self.rate)

    @property
    def title(self) -> str:
        """For people."""
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.method} W{self.weight_bits:g}A{self.act_bits} seed {self.seed}{rate} ({self.scale})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Run:
        """The run that a row is of."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})
