"""What a BitBudget holds the widths to: costs with their targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from cpq_lightning.attach.layers import is_attached, quantizers
from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.gate_update import Budget
from cpq_lightning.bitwidth.model_cost import CostUnit, width_cost
from cpq_lightning.bitwidth.rounding import WidthChange
from cpq_lightning.functional.schedule import anneal
from cpq_lightning.nn.quantizer import Quantizer

BudgetUnit = Literal["bits", "bytes", "bops"]

# How far below the target decided widths may stay without bits moving from layer to layer: in bits, and in bytes or bit
# operations as a share of the target.
_TOLERANCE_BITS, _TOLERANCE_SHARE = 0.04, 0.015
# Of a sum of many shares.
_ROUNDING = 1e-9
_MOST_NAMED = 20
_SPELLED_OUT = {
    "weight_bits": "average bits of the weights",
    "act_bits": "average bits of the activations",
    "bytes": "bytes of the packed file",
    "bops": "bit operations",
}


@dataclass
class Constraint:
    """A budget with its target and the expected cost that it started from."""

    name: CostUnit | Literal["bytes"]
    budget: Budget
    target: float
    first: float

    @property
    def tolerance(self) -> float:
        """How far below the target decided widths may stay without bits moving from layer to layer."""
        return _TOLERANCE_BITS if self.name.endswith("bits") else _TOLERANCE_SHARE * self.target

    @property
    def _spelled_out(self) -> str:
        return _SPELLED_OUT.get(self.name, self.name)

    def scheduled_target(self, progress: float) -> float:
        """The expected cost wanted at a part of the way down; geometric, so that most of it is left for low widths."""
        return anneal(round(1e6 * progress), 0, 10**6, self.first, self.target, "exponential")

    def describe(self, widths: Tensor, moved: list[dict[str, Any]]) -> str:
        """A sentence on the decision, with the widths that were changed to meet the target, and what is left of it."""
        # Channels that have a width each are told together.
        counted = Counter((change["name"], change["before"], change["after"]) for change in moved)
        listed = [
            f"{f'{count} channels of ' if count > 1 else ''}{name} from {before} to {after} bits"
            for (name, before, after), count in counted.items()
        ]
        more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
        how = f"after changing {', '.join(listed[:_MOST_NAMED])}{more}" if listed else "as learned"
        spent = self.budget.cost.of_whole(widths)
        left = self.target - spent
        below = f", {left:.3g} below it" if left > 1e-9 * self.target else ""
        return (
            f"BitBudget: widths are decided, {how}: {_figures(spent)} {self._spelled_out} for a target of "
            f"{_figures(self.target)}{below}."
        )

    def check_reach(self, narrowest: Tensor, widest: Tensor) -> None:
        """Refuse a target that even the narrowest widths cost more than, or the widest ones far less.

        Raises:
            ValueError: naming the range within reach.
        """
        low, high = (self.budget.cost.of_whole(widths) for widths in (narrowest, widest))
        if not low <= self.target * (1 + _ROUNDING) or self.target > high + self.tolerance:
            raise ValueError(
                f"BitBudget: the target of {_figures(self.target)} {self._spelled_out} is out of reach: the widths "
                f"that are learned allow {_figures(low)} to {_figures(high)}. Change the target, or min_bits, "
                "weight_bits and first_last_bits of CPQConfig."
            )


def _figures(value: float) -> str:
    """Bytes to the last one, and averages to six figures."""
    return f"{value:.0f}" if value == int(value) and 10 <= value < 1e9 else f"{value:.6g}"


def net_changes(changes: list[WidthChange], names: list[str]) -> list[dict[str, Any]]:
    """What several changes come to: name of the quantizer, width before and after, one entry a row that differs."""
    first = {change.row: change.before for change in reversed(changes)}
    last = {change.row: change.after for change in changes}
    return [
        {"name": names[row], "before": first[row], "after": last[row]}
        for row in sorted(first)
        if first[row] != last[row]
    ]


def make_constraints(
    model: nn.Module,
    learners: Sequence[Quantizer],
    target: float,
    unit: BudgetUnit,
    act_target: float | None,
    byte_cost: Callable[[], WidthCost],
) -> list[Constraint]:
    """The constraints that a budget sets for the learners' widths.

    Args:
        model: An attached model.
        learners: The quantizers that learn a width.
        target: What the model may cost at most, in ``unit``.
        unit: ``"bits"``, ``"bytes"`` or ``"bops"``.
        act_target: Average bits of learned activations.
        byte_cost: What the learners' widths cost in bytes of the file, asked where ``unit`` is ``"bytes"``.

    Raises:
        ValueError: learned activations without a target, or bit operations that are not known.
    """
    kinds = {q.kind for q in learners}
    wanted: list[tuple[Any, float]] = []
    if unit == "bits" and "weight" in kinds:
        wanted.append(("weight_bits", target))
    elif unit != "bits":
        wanted.append((unit, target))
    if act_target is not None and "activation" not in kinds:
        raise ValueError(
            f"BitBudget(act_target={act_target:g}) has no activation to learn: set learn_act_bits=True with act_bits "
            "over min_act_bits in CPQConfig, or leave act_target out."
        )
    if "activation" in kinds and unit != "bops":
        own = act_target or (target if unit == "bits" else None)
        if own is None:
            raise ValueError(
                "BitBudget(unit='bytes') puts no price on activations, which learn_act_bits=True asks to learn: give "
                "act_target, their average bits, or count unit='bops'."
            )
        wanted.append(("act_bits", own))
    try:
        costs = [byte_cost() if name == "bytes" else width_cost(model, learners, name) for name, _ in wanted]
    except ValueError as error:
        raise ValueError(f"BitBudget(unit={unit!r}): {error}") from error
    return [Constraint(name, Budget(cost), value, value) for (name, value), cost in zip(wanted, costs, strict=True)]


def check_not_all_first_or_last(model: nn.Module) -> None:
    """Refuse a model in which all layers that could learn a width are first or last ones, whose width is given.

    Raises:
        ValueError: naming them, and ``first_last_bits``.
    """
    for kind in ("weight", "activation"):
        own = [(name, q) for name, q in quantizers(model) if q.gates.learned and q.kind == kind]
        if own and all(q.first_or_last for _, q in own):
            raise ValueError(
                f"BitBudget has no {kind} to learn a width of: all {len(own)} that could ({_some(own)}) are of first "
                f"or last layers, which keep first_last_bits={own[0][1].bits}. Set first_last_bits=None in CPQConfig, "
                "or give these layers weight_bits of their own in overrides."
            )


def _some(named: list[tuple[str, Quantizer]], most: int = 4) -> str:
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(name for name, _ in named[:most]) + more


def explain_nothing_to_learn(
    model: nn.Module, targets: Mapping[str, float], done: Mapping[str, Any] | None
) -> tuple[str, bool]:
    """Why no width is learned: all are fixed already, or, as an error, none ever was to be.

    Args:
        model: The module that is trained.
        targets: What its budget asks for, by what it counts.
        done: State of the search that a checkpoint holds, if any.

    Returns:
        A sentence, and whether it is a warning: the widths were fixed for other targets.

    Raises:
        ValueError: with what to do.
    """
    if not is_attached(model):
        raise ValueError(
            f"BitBudget found no quantizer in {type(model).__name__}: add CPQCallback to the Trainer, or train a "
            "QuantizedModule."
        )
    check_not_all_first_or_last(model)
    if any(q.gates.learned for _, q in quantizers(model)):
        then = {} if done is None else {name: target for name, target, _ in done["goals"]}
        if any(targets.get(name) != target for name, target in then.items()):
            named = ", ".join(f"{target:g} {_SPELLED_OUT.get(name, name)}" for name, target in then.items())
            return (
                f"BitBudget comes too late with its target: the checkpoint's widths were fixed for {named} and stay as "
                "they are. Resume from a checkpoint before its freeze, or begin anew."
            ), True
        return "BitBudget: all widths are fixed already; they stay as they are.", False
    raise ValueError(
        "BitBudget has nothing to learn: no quantizer has widths to choose from. Set "
        "CPQConfig(weight_bits=8, min_bits=2, learn_bits=True), or leave BitBudget out."
    )
