"""The ways to train a network that are measured, each with what it is measured against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.train_step import peers
from benchmarks.train_step.learning import Learning
from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.first_forward import forget_first_forwards

FULL, TORCH = "full precision", "torch learnable fake-quantize"
EXPECTATION, ARGMAX = "CPQ expectation", "CPQ argmax"
WIDE, NARROW = "CPQ expectation, 8 bits", "CPQ expectation, 2 bits"
LEARNED, FROZEN = "CPQ, widths of 8 to 2 bits learned", "CPQ, widths fixed after learning"
FUNCTIONAL, BRUTE = "CPQ expectation, functional", "CPQ expectation, brute force"
ATTENTION = "CPQ expectation, attention too"
BREVITAS, NNCF = "Brevitas", "NNCF, int8"


@dataclass(frozen=True)
class Variant:
    """One way to train a network.

    Attributes:
        build: Makes it of a network and a batch; the batch has the size of those that come.
        against: Names of the variants that its figures are put in relation to.
        option: The command's option that asks for it; empty for those that are always measured.
        extra: The optional dependency group that it needs, ``bench-`` and the name of the package.
        kernels: Whether CPQ's compiled kernels may compute.
        learns: Whether the search for widths runs beside the optimizer.
        compiled: Whether it is measured with ``torch.compile`` too.
        rounds: Most rounds that it takes part in.
    """

    build: Callable[[nn.Module, Tensor], nn.Module]
    against: tuple[str, ...] = (FULL, TORCH)
    option: str = ""
    extra: str = ""
    kernels: bool = True
    learns: bool = False
    compiled: bool = False
    rounds: int | None = None

    @property
    def missing(self) -> str:
        """What to install before it can run here; empty if it can."""
        package = self.extra.removeprefix("bench-")
        if not package or importlib.util.find_spec(package) is not None:
            return ""
        return f"{package} is not installed: pip install -e '.[{self.extra}]', in an environment of its own"


def full_precision(model: nn.Module, images: Tensor) -> nn.Module:
    return model


def _cpq(**settings: Any) -> Callable[[nn.Module, Tensor], nn.Module]:
    def build(model: nn.Module, images: Tensor) -> nn.Module:
        ignore = tuple(name for name, _ in peers.layers(model) if not peers.is_site(model, name))
        config = CPQConfig(first_last_bits=None, ignore=ignore, **settings)
        calibrate(attach(model, config, example_inputs=images), [images])
        # The model's hooks look at its first forwards, of which there are few in a run: they are not what is measured.
        forget_first_forwards(model)
        return model

    return build


_learned = _cpq(weight_bits=8, min_bits=2, learn_bits=True)


def frozen(model: nn.Module, images: Tensor) -> nn.Module:
    """Widths as they are once BitBudget has fixed them."""
    model = _learned(model, images)
    Learning(model).fix()
    return model


VARIANTS: dict[str, Variant] = {
    FULL: Variant(full_precision, against=(), compiled=True),
    TORCH: Variant(peers.torch_learnable, against=(FULL,)),
    EXPECTATION: Variant(_cpq(), compiled=True),
    ARGMAX: Variant(_cpq(weight_estimator="argmax", act_estimator="argmax"), compiled=True),
    WIDE: Variant(_cpq(weight_bits=8, act_bits=8), against=(FULL, TORCH, NARROW)),
    NARROW: Variant(_cpq(weight_bits=2, act_bits=2)),
    LEARNED: Variant(_learned, against=(FULL, TORCH, EXPECTATION), learns=True),
    FROZEN: Variant(frozen, against=(FULL, TORCH, EXPECTATION)),
    ATTENTION: Variant(_cpq(attention=True), against=(FULL, EXPECTATION), option="attention"),
    FUNCTIONAL: Variant(_cpq(), against=(FULL, EXPECTATION), option="functional", kernels=False),
    # Dozens of times as long as the others, which need more rounds the shorter they are.
    BRUTE: Variant(peers.brute_force, against=(FULL, EXPECTATION), option="brute_force", rounds=3),
    BREVITAS: Variant(peers.brevitas, against=(FULL, EXPECTATION), extra="bench-brevitas"),
    NNCF: Variant(peers.nncf, against=(FULL, EXPECTATION), extra="bench-nncf"),
}


def selected(
    options: Any, say: Callable[[str], None], known: dict[str, Variant] | None = None
) -> tuple[list[str], dict[str, Variant]]:
    """Names of the variants that are asked for, and these with all that they are measured against.

    Args:
        options: ``only`` (names, or none), ``compile``, and the options that some variants need.
        say: Told which are skipped, and why.
        known: All variants there are.

    Raises:
        ValueError: one that is asked for by name cannot run here.
    """
    known = VARIANTS if known is None else known
    wanted = []
    for name, variant in known.items():
        named = name in (options.only or ())
        if options.only and not named:
            continue
        if options.compile and not variant.compiled:
            if named:
                raise ValueError(f"--compile measures {[n for n, v in known.items() if v.compiled]}, not {name!r}.")
            continue
        if variant.option and not named and not getattr(options, variant.option):
            continue
        if variant.missing:
            if named:
                raise ValueError(f"{name} cannot be measured: {variant.missing}.")
            say(f"{name} is skipped: {variant.missing}.")
            continue
        wanted.append(name)
    partners = {partner for name in wanted for partner in known[name].against}
    return wanted, {
        name: variant
        for name, variant in known.items()
        if name in wanted or (name in partners and (variant.compiled or not options.compile))
    }
