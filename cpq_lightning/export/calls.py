"""Arguments and outputs of a model as flat lists of named tensors, and checks for values that no file can contain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
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
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from cpq_lightning.attach.calls import Call, forward_signature

# Types of arguments, apart from tensors, that a file can contain.
Constant = bool | int | float | str | None
_REGISTER = (
    "pass its tensors in tuples, lists or dicts, or register the class with torch.export.register_dataclass (or "
    "torch.utils._pytree.register_pytree_node)"
)


class _Place(Enum):
    """Stands for a tensor among the leaves of a call."""

    TENSOR = "tensor"


TENSOR = _Place.TENSOR


@dataclass(frozen=True)
class Form:
    """The structure of a call: everything but its tensors.

    Attributes:
        spec: The containers of ``(args, kwargs)``, as a TreeSpec of torch's pytree.
        leaves: The content of the containers, in order: a constant, or :data:`TENSOR` in place of a tensor.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    def call(self, tensors: Sequence[Tensor]) -> Call:
        """The positional and keyword arguments with these tensors.

        Raises:
            ValueError: the number of tensors is wrong.
        """
        if len(tensors) != sum(leaf is TENSOR for leaf in self.leaves):
            raise ValueError(f"The call has {self.leaves.count(TENSOR)} tensors, got {len(tensors)}.")
        remaining = iter(tensors)
        args, kwargs = tree_unflatten([next(remaining) if leaf is TENSOR else leaf for leaf in self.leaves], self.spec)
        return args, kwargs

    def places(self, model: nn.Module) -> tuple[list[str], dict[str, Constant]]:
        """The names of the tensors in order, and the constants by name.

        A name begins with the parameter of the model's forward that takes the argument: ``mask``, or
        ``batch.image.0`` for a value inside an argument.
        """
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        named = _argument_leaves((args, kwargs), model)
        tensors = [name for name, leaf in named if leaf is TENSOR]
        return tensors, {name: leaf for name, leaf in named if leaf is not TENSOR}


def split_call(call: Call, model: nn.Module | None = None) -> tuple[list[Tensor], Form]:
    """Split a call into its tensors and its form.

    Args:
        call: Positional and keyword arguments.
        model: The module that is called; its forward gives the names of positional arguments in messages.

    Raises:
        TypeError: an argument is or contains a value that is neither a tensor nor a constant; the message names it.
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
    """Serialize the containers of a call as text.

    Raises:
        TypeError: the class of a container is registered with torch's pytree without a serialized name.
    """
    try:
        return treespec_dumps(form.spec)
    except (NotImplementedError, TypeError) as error:
        raise TypeError(
            "samples: an argument is an instance of a class that cannot be serialized. Pass the tensors in tuples, "
            "lists or dicts, or register the class with torch.utils._pytree.register_pytree_node and a "
            f"serialized_type_name, both here and where the file is read. torch says: {error}"
        ) from None


def load_spec(text: str) -> TreeSpec:
    """Read the text of :func:`dump_spec`.

    Raises:
        ValueError: the text is not valid, or names a class that is not registered in this process.
    """
    try:
        return treespec_loads(text)
    except (AssertionError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"the containers of its call cannot be read ({type(error).__name__}: {error}); if they are of your "
            "classes, first import the module that registers these classes with torch's pytree"
        ) from None


def _argument_leaves(call: Call, model: nn.Module | None) -> list[tuple[str, Any]]:
    """The leaves of a call's arguments in order, named by the argument and the keys that lead to the leaf."""
    args, kwargs = call
    positional = [] if model is None else _parameters(model)
    named = []
    for index, argument in enumerate(args):
        name = str(index)
        if positional and positional[-1].startswith("*") and index >= len(positional) - 1:
            name = f"{positional[-1][1:]}.{index - len(positional) + 1}"
        elif index < len(positional):
            name = positional[index]
        named += [(".".join([name, *keys]), leaf) for keys, leaf in _leaves(argument)]
    for name, argument in kwargs.items():
        named += [(".".join([name, *keys]), leaf) for keys, leaf in _leaves(argument)]
    return named


def _parameters(model: nn.Module) -> list[str]:
    """The names of a forward's positional parameters; ``*args`` is the last one and keeps its star."""
    names = []
    for parameter in forward_signature(model).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return [*names, f"*{parameter.name}"]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names


def _leaves(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[list[str], Any]]:
    """The leaves of containers that torch's pytree knows, in order, with the keys that lead to each leaf."""
    try:
        return [([_key(entry) for entry in path], leaf) for path, leaf in tree_flatten_with_path(value, is_leaf)[0]]
    except ValueError:
        # A class in the value was registered without keys.
        return [([str(i)], leaf) for i, leaf in enumerate(tree_flatten(value, is_leaf)[0])]


def _key(entry: Any) -> str:
    if isinstance(entry, SequenceKey):
        return str(entry.idx)
    if isinstance(entry, MappingKey):
        return str(entry.key)
    return entry.name if isinstance(entry, GetAttrKey) else str(entry).strip(".[]")


def named_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors in a model's output, in any containers, with names. ``None`` in the output is ignored.

    Containers are those that torch's pytree knows, and any mapping or dataclass, whose entries come in their order.

    A single tensor is named ``output``. Several are named by the keys that lead to them, such as ``boxes.0``; a name
    that begins with a number gets the prefix ``output_``.

    Raises:
        TypeError: the output contains a value that is no tensor (the message names it), or no tensor.
    """
    named = []
    for keys, leaf in _all_leaves(output):
        name = ".".join(keys)
        if isinstance(leaf, Tensor):
            named.append((f"output_{name}" if name[:1].isdigit() else name or "output", leaf))
        elif leaf is not None:
            where = f"the output {name!r} of the model" if name else "the output of the model"
            raise TypeError(
                f"{where} is {type(leaf).__name__}, and an exported model returns only tensors, and tuples, lists, "
                "dicts and dataclasses of them: do not return it in evaluation (a cache of keys and values: set "
                "use_cache=False in the model's config), or let export_module() of the LightningModule return the "
                "submodule that returns only tensors."
            )
    if not named:
        raise TypeError("The model returns no tensor: an export would compute nothing.")
    return [("output", named[0][1])] if len(named) == 1 else named


def _all_leaves(value: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """:func:`_leaves`, also of containers that torch's pytree does not know, or knows without keys."""
    for keys, leaf in _leaves(value, lambda part: isinstance(part, Mapping)):
        items = _items(leaf)
        if items is None:
            yield (*prefix, *keys), leaf
            continue
        for key, item in items.items():
            yield from _all_leaves(item, (*prefix, *keys, key))


def _items(value: Any) -> dict[str, Any] | None:
    """The entries of a mapping, a sequence or a dataclass, in order; ``None`` for anything else."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, tuple | list):
        return {str(i): item for i, item in enumerate(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def in_known_containers(output: Any) -> Any:
    """A model's output with dicts in place of the containers that torch's pytree does not know."""

    def known(leaf: Any) -> Any:
        items = _items(leaf)
        return leaf if items is None else {key: in_known_containers(item) for key, item in items.items()}

    return tree_map(known, output)


def flat_outputs(output: Any) -> list[Tensor]:
    """The tensors of :func:`named_outputs`."""
    return [tensor.detach() for _, tensor in named_outputs(output)]


@contextmanager
def forward_replaced(network: nn.Module, forward: Callable[..., Any], signature: inspect.Signature) -> Iterator[None]:
    """Replace a network's forward and its signature while it is traced; the names of its submodules stay."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Exporters read the names and defaults of arguments from the signature.
    replaced.__signature__ = signature  # type: ignore[attr-defined]
    previous = network.__dict__.get("forward")
    network.__dict__["forward"] = replaced
    try:
        yield
    finally:
        if previous is None:
            del network.__dict__["forward"]
        else:
            network.__dict__["forward"] = previous
