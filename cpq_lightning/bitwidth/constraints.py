"""The constraints of a BitBudget: costs of the bit widths, each with a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from cpq_lightning.attach.audit import listed
from cpq_lightning.attach.layers import is_attached, quantizers
from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.gate_update import Budget
from cpq_lightning.bitwidth.model_cost import CostUnit, width_cost
from cpq_lightning.bitwidth.rounding import WidthChange
from cpq_lightning.functional.schedule import anneal
from cpq_lightning.nn.quantizer import Quantizer

BudgetUnit = Literal["bits", "bytes", "bops"]

# Decided widths may cost less than the target by this much before bits are exchanged between layers: in bits for
# averages, as a share of the target for bytes and bit operations.
_TOLERANCE_BITS, _TOLERANCE_SHARE = 0.04, 0.015
# Relative rounding error of a sum of many terms.
_ROUNDING = 1e-9
_MAX_LISTED = 20
_DESCRIPTIONS = {
    "weight_bits": "average bits of the weights",
    "act_bits": "average bits of the activations",
    "bytes": "bytes of the packed file",
    "bops": "bit operations",
}


@dataclass
class Constraint:
    """A budget with its target and its expected cost at the first step."""

    name: CostUnit | Literal["bytes"]
    budget: Budget
    target: float
    first: float

    @property
    def tolerance(self) -> float:
        """How far below the target decided widths may stay before bits are exchanged between layers."""
        return _TOLERANCE_BITS if self.name.endswith("bits") else _TOLERANCE_SHARE * self.target

    @property
    def _description(self) -> str:
        return _DESCRIPTIONS.get(self.name, self.name)

    def scheduled_target(self, progress: float) -> float:
        """Target for the expected cost at ``progress`` (0 to 1) of the descent.

        The target falls geometrically, so that most of the descent is spent at low widths.
        """
        return anneal(
            round(1e6 * progress), start=0, end=10**6, first=self.first, last=self.target, shape="exponential"
        )

    def describe(self, widths: Tensor, changes: list[dict[str, Any]]) -> str:
        """A sentence on the decision: the widths changed to meet the target, the cost, and the rest of the target."""
        # Channels of one quantizer with the same change are listed together.
        counted = Counter((change["name"], change["before"], change["after"]) for change in changes)
        described = [
            f"{f'{count} channels of ' if count > 1 else ''}{name} from {before} to {after} bits"
            for (name, before, after), count in counted.items()
        ]
        how = f"after changing {listed(described, _MAX_LISTED)}" if described else "as learned"
        spent = self.budget.cost.of_integer_widths(widths)
        left = self.target - spent
        below = f", {left:.3g} below it" if left > 1e-9 * self.target else ""
        return (
            f"BitBudget: widths are decided, {how}: {_figures(spent)} {self._description} for a target of "
            f"{_figures(self.target)}{below}."
        )

    def check_reach(self, narrowest: Tensor, widest: Tensor) -> None:
        """Check that the target lies between the costs of the narrowest and of the widest widths.

        Raises:
            ValueError: The target is out of reach. The message gives the reachable range.
        """
        low, high = (self.budget.cost.of_integer_widths(widths) for widths in (narrowest, widest))
        if not low <= self.target * (1 + _ROUNDING) or self.target > high + self.tolerance:
            raise ValueError(
                f"BitBudget: the target of {_figures(self.target)} {self._description} is out of reach: the learned "
                f"widths allow {_figures(low)} to {_figures(high)}. Change the target, or min_bits, "
                "weight_bits and first_last_bits of CPQConfig."
            )


def _figures(value: float) -> str:
    """Whole numbers such as bytes in full, other numbers to six significant digits."""
    return f"{value:.0f}" if value == int(value) and 10 <= value < 1e9 else f"{value:.6g}"


def net_changes(changes: list[WidthChange], names: list[str]) -> list[dict[str, Any]]:
    """The net effect of ``changes``: quantizer name, width before and after, one entry for each row that differs."""
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
    act_target: float | None = None,
    byte_cost: Callable[[], WidthCost] | None = None,
) -> list[Constraint]:
    """The constraints that a budget sets on the widths of ``learners``.

    Args:
        model: An attached model.
        learners: The quantizers that learn a width.
        target: The maximum cost of the model, in ``unit``.
        unit: ``"bits"``, ``"bytes"`` or ``"bops"``.
        act_target: Target for the average bits of learned activations.
        byte_cost: Returns the cost of the learners' widths in bytes of the packed file. Called only with
            ``unit="bytes"``.

    Raises:
        ValueError: Learned activations have no target, ``act_target`` is given without learned activations, or bit
            operations are not known.
    """
    kinds = {q.kind for q in learners}
    targets: list[tuple[Any, float]] = []
    if unit == "bits" and "weight" in kinds:
        targets.append(("weight_bits", target))
    elif unit != "bits":
        targets.append((unit, target))
    if act_target is not None and "activation" not in kinds:
        raise ValueError(
            f"BitBudget(act_target={act_target:g}) has no activation to learn: set learn_act_bits=True with act_bits "
            "over min_act_bits in CPQConfig, or leave act_target out."
        )
    if "activation" in kinds and unit != "bops":
        activation_target = act_target or (target if unit == "bits" else None)
        if activation_target is None:
            raise ValueError(
                "BitBudget(unit='bytes') does not count activations, whose widths learn_act_bits=True learns: "
                "give act_target, their average bits, or use unit='bops'."
            )
        targets.append(("act_bits", activation_target))
    try:
        costs = [_cost(model, learners, name, byte_cost) for name, _ in targets]
    except ValueError as error:
        raise ValueError(f"BitBudget(unit={unit!r}): {error}") from error
    return [Constraint(name, Budget(cost), value, value) for (name, value), cost in zip(targets, costs, strict=True)]


def _cost(
    model: nn.Module, learners: Sequence[Quantizer], name: Any, byte_cost: Callable[[], WidthCost] | None
) -> WidthCost:
    if name != "bytes":
        return width_cost(model, learners, name)
    if byte_cost is None:
        raise ValueError(
            "bytes are those of a file: give byte_cost, which returns the cost of the widths in that file."
        )
    return byte_cost()


def check_not_all_first_or_last(model: nn.Module) -> None:
    """Refuse a model in which every layer that could learn a width is a first or last layer, at ``first_last_bits``.

    Raises:
        ValueError: All candidates are first or last layers. The message names them and ``first_last_bits``.
    """
    for kind in ("weight", "activation"):
        candidates = {name: q for name, q in quantizers(model) if q.gates.learned and q.kind == kind}
        if candidates and all(q.first_or_last for q in candidates.values()):
            raise ValueError(
                f"BitBudget has no {kind} to learn a width of: all {len(candidates)} candidates "
                f"({listed(list(candidates))}) are first or last layers, at "
                f"first_last_bits={next(iter(candidates.values())).bits}. "
                "Set first_last_bits=None in CPQConfig, or give these layers weight_bits in overrides."
            )


def explain_nothing_to_learn(
    model: nn.Module, targets: Mapping[str, float], done: Mapping[str, Any] | None
) -> tuple[str, bool]:
    """Explain why no width is learned: all widths are fixed already, or the configuration learns none (an error).

    Args:
        model: The module that is trained.
        targets: The targets of its budget, by the name of the cost.
        done: The state of the search in the checkpoint, if there is one.

    Returns:
        A sentence, and whether to warn: ``True`` if the widths were fixed for other targets.

    Raises:
        ValueError: The configuration learns no width. The message says what to change.
    """
    if not is_attached(model):
        raise ValueError(
            f"BitBudget found no quantizer in {type(model).__name__}: add CPQCallback to the Trainer, or train a "
            "QuantizedModule."
        )
    check_not_all_first_or_last(model)
    if any(q.gates.learned for _, q in quantizers(model)):
        previous = {} if done is None else {name: target for name, target, _ in done["goals"]}
        if any(targets.get(name) != target for name, target in previous.items()):
            named = ", ".join(f"{target:g} {_DESCRIPTIONS.get(name, name)}" for name, target in previous.items())
            return (
                f"BitBudget comes too late with its target: the checkpoint's widths were fixed for {named} and stay "
                "unchanged. Resume from a checkpoint before its freeze, or start a new run."
            ), True
        return "BitBudget: all widths are fixed already; they stay unchanged.", False
    raise ValueError(
        "BitBudget has nothing to learn: no quantizer has widths to choose from. Set "
        "CPQConfig(weight_bits=8, min_bits=2, learn_bits=True), or leave BitBudget out."
    )
