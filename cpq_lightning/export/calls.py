"""What a model takes and returns, in whatever containers, as tensors with names; and what no file can hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from cpq_lightning.attach.calls import Call, forward_signature

# Arguments that are no tensors, and a file can hold.
Constant = bool | int | float | str | None
_REGISTER = (
    "hand its tensors over in tuples, lists or dicts, or register the class with torch.export.register_dataclass (or "
    "torch.utils._pytree.register_pytree_node)"
)


class _Place(Enum):
    """Stands for a tensor among the leaves of a call."""

    TENSOR = "tensor"


TENSOR = _Place.TENSOR


@dataclass(frozen=True)
class Form:
    """How a model is called: everything of a call but its tensors.

    Attributes:
        spec: The containers of ``(args, kwargs)``, as torch's pytree has them.
        leaves: What is in them, in order: a constant, or :data:`TENSOR`.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    def call(self, tensors: Sequence[Tensor]) -> Call:
        """The call with these tensors.

        Raises:
            ValueError: there are more or fewer than the call has.
        """
        if len(tensors) != sum(leaf is TENSOR for leaf in self.leaves):
            raise ValueError(f"The call has {self.leaves.count(TENSOR)} tensors, got {len(tensors)}.")
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if leaf is TENSOR else leaf for leaf in self.leaves], self.spec)
        return args, kwargs

    def places(self, model: nn.Module) -> tuple[list[str], dict[str, Constant]]:
        """The names of the tensors in order, and the constants by name: ``mask``, or ``batch.image.0`` for what is
        inside of an argument, each after the parameter of the model's forward that takes it.
        """
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        named = _argument_leaves((args, kwargs), model)
        tensors = [name for name, leaf in named if leaf is TENSOR]
        return tensors, {name: leaf for name, leaf in named if leaf is not TENSOR}


def split_call(call: Call, model: nn.Module | None = None) -> tuple[list[Tensor], Form]:
    """The tensors of a call, and its form.

    Args:
        call: Positional and keyword arguments.
        model: What is called with them, which knows their names.

    Raises:
        TypeError: an argument is, or has inside, something that is neither a tensor nor a constant; it says which.
    """
    flat, spec = tree_flatten(call)
    for name, leaf in _argument_leaves(call, model):
        if not isinstance(leaf, Tensor) and leaf is not None and type(leaf) not in (bool, int, float, str):
            raise TypeError(
                f"the argument {name!r} is {type(leaf).__name__}, and an export takes tensors, numbers, strings and "
                f"None, and tuples, lists and dicts of them: {_REGISTER}."
            )
    leaves = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in flat)
    return [leaf for leaf in flat if isinstance(leaf, Tensor)], Form(spec, leaves)


def dump_spec(form: Form) -> str:
    """The containers of a call as text.

    Raises:
        TypeError: one of them is of a class that torch's pytree knows no name of.
    """
    try:
        return treespec_dumps(form.spec)
    except (NotImplementedError, TypeError) as error:
        raise TypeError(
            f"samples: the arguments come in a class that no file can name ({error}) Hand its tensors over in tuples, "
            "lists or dicts, or register it with a serialized_type_name, here and where the file is read."
        ) from None


def load_spec(text: str) -> TreeSpec:
    """What :func:`dump_spec` has written.

    Raises:
        ValueError: it is no such text, or of a class that is not registered in this process.
    """
    try:
        return treespec_loads(text)
    except (AssertionError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"the containers of its call cannot be read ({type(error).__name__}: {error}); where they have classes of "
            "your own, import the module that registers them with torch's pytree first"
        ) from None


def _argument_leaves(call: Call, model: nn.Module | None) -> list[tuple[str, Any]]:
    """What is in the arguments of a call, in order, each by the name of its argument and the keys that lead there."""
    args, kwargs = call
    positional = [] if model is None else _parameters(model)
    found = []
    for place, argument in enumerate(args):
        name = str(place)
        if positional and positional[-1].startswith("*") and place >= len(positional) - 1:
            name = f"{positional[-1][1:]}.{place - len(positional) + 1}"
        elif place < len(positional):
            name = positional[place]
        found += [(".".join([name, *keys]), leaf) for keys, leaf in _leaves(argument)]
    for name, argument in kwargs.items():
        found += [(".".join([name, *keys]), leaf) for keys, leaf in _leaves(argument)]
    return found


def _parameters(model: nn.Module) -> list[str]:
    """The names of a forward's positional parameters; the last one takes all that come behind, with its star."""
    names = []
    for parameter in forward_signature(model).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return [*names, f"*{parameter.name}"]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names


def _leaves(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[list[str], Any]]:
    """What is in containers that torch's pytree knows, in order, with the keys that lead there."""
    try:
        return [([_key(entry) for entry in path], leaf) for path, leaf in tree_flatten_with_path(value, is_leaf)[0]]
    except ValueError:
        # A class that was registered without keys.
        return [([str(i)], leaf) for i, leaf in enumerate(tree_flatten(value, is_leaf)[0])]


def _key(entry: Any) -> str:
    if isinstance(entry, SequenceKey):
        return str(entry.idx)
    if isinstance(entry, MappingKey):
        return str(entry.key)
    return entry.name if isinstance(entry, GetAttrKey) else str(entry).strip(".[]")


def named_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors that a model returns, in whatever containers, with names: ``output`` for a tensor that comes alone,
    else the keys that lead there, as ``boxes.0``, behind ``output_`` where the first one is a number. None is left out.

    Raises:
        TypeError: it returns something else; it says which.
    """
    found = []
    for keys, leaf in _all_leaves(output):
        name = ".".join(keys)
        if isinstance(leaf, Tensor):
            found.append((f"output_{name}" if name[:1].isdigit() else name or "output", leaf))
        elif leaf is not None:
            where = f"the output {name!r} of the model" if name else "the output of the model"
            raise TypeError(
                f"{where} is {type(leaf).__name__}, and an export holds tensors, and tuples, lists and dicts of them: "
                "leave it out in evaluation, or let export_module() of the LightningModule return the part that "
                "returns tensors alone."
            )
    if not found:
        raise TypeError("The model returns no tensor: an export would compute nothing.")
    return [("output", found[0][1])] if len(found) == 1 else found


def _all_leaves(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """:func:`_leaves`, and those of mappings and sequences that torch's pytree does not know, or knows without keys."""
    for keys, leaf in _leaves(value, lambda part: isinstance(part, Mapping)):
        if isinstance(leaf, Mapping):
            inside = leaf.items()
        elif isinstance(leaf, tuple | list):
            inside = enumerate(leaf)
        else:
            yield (*above, *keys), leaf
            continue
        for key, inner in inside:
            yield from _all_leaves(inner, (*above, *keys, str(key)))


def flat_outputs(output: Any) -> list[Tensor]:
    """The tensors of :func:`named_outputs`."""
    return [tensor.detach() for _, tensor in named_outputs(output)]


@contextmanager
def forward_replaced(network: nn.Module, forward: Callable[..., Any], signature: inspect.Signature) -> Iterator[None]:
    """Let a network that is traced take the arguments of another signature, under the names of its own parts."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Exporters read names and defaults there.
    replaced.__signature__ = signature  # type: ignore[attr-defined]
    own = network.__dict__.get("forward")
    network.__dict__["forward"] = replaced
    try:
        yield
    finally:
        if own is None:
            del network.__dict__["forward"]
        else:
            network.__dict__["forward"] = own
