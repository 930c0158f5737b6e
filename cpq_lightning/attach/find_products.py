"""Which modules multiply two activations, seen in one forward of a model that is not quantized yet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.calls import Call, as_call
from cpq_lightning.attach.first_forward import auditable
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.attach.torch_ops import product_operands

if TYPE_CHECKING:
    from typing_extensions import Self

_REMEDY = (
    "give attach(..., example_inputs=batch), or set the LightningModule's example_input_array (of a QuantizedModule "
    "around a network of your own: set it, and leave quantizing to CPQCallback)"
)


@dataclass
class Products:
    """What a module multiplies by itself: see :class:`~cpq_lightning.attach.products.QuantizedProducts`."""

    plan: list[bool] = field(default_factory=list)
    counts: set[int] = field(default_factory=set)


def find_products(model: nn.Module, example_inputs: Any = None) -> dict[str, Products]:
    """The modules that multiply tensors by themselves, by name.

    A product counts where one of its sides depends on the input: rotary frequencies and tables looked up by position
    do not. The forward runs in evaluation, and leaves nothing behind.

    Args:
        model: A model that is not quantized.
        example_inputs: What to call the model with: see :func:`~cpq_lightning.attach.calls.as_call`. Without them a
            LightningModule's ``example_input_array`` is taken, or timm backbones in it are called with images of their
            own size.

    Raises:
        ValueError: there is nothing to call the model with, the call fails, or the model is compiled.
    """
    if not auditable(model):
        raise ValueError(
            "attention=True has to see a forward, and compiled code shows none: compile the model afterwards."
        )
    given = example_inputs if example_inputs is not None else getattr(model, "example_input_array", None)
    if given is not None:
        try:
            return _found(model, as_call(model, given))
        except Exception as error:
            raise ValueError(f"attention=True: the forward with the example inputs fails ({error}).") from error
    found: dict[str, Products] = {}
    backbones = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "pretrained_cfg", None), Mapping)]
    if not backbones:
        raise ValueError(
            f"attention=True has to see one forward of {type(model).__name__}, to know what it multiplies: use a "
            f"timm backbone, {_REMEDY}."
        )
    for name, backbone in backbones:
        prefix = f"{name}." if name else ""
        for inner, products in _of_backbone(name, backbone).items():
            found[prefix + inner if inner else name] = products
    return found


def _of_backbone(name: str, backbone: nn.Module) -> dict[str, Products]:
    cfg: Mapping[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = cfg["input_size"]
    convolution = next((m for m in backbone.modules() if isinstance(m, _ConvNd)), None)
    own_size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    # Other channels or another size than the config's may have been asked for when it was built.
    depths = [channels] if convolution is None else [channels, convolution.in_channels]
    sizes = [(height, width)] if own_size is None else [tuple(own_size), (height, width)]
    failure: Exception | None = None
    for depth, size in itertools.product(dict.fromkeys(depths), dict.fromkeys(sizes)):
        try:
            return _found(backbone, ((torch.zeros(1, depth, *size),), {}))
        except Exception as error:
            failure = failure or error
    raise ValueError(
        f"attention=True: the backbone {name or type(backbone).__name__!r} does not run on images of {sizes} "
        f"({failure}): {_REMEDY}."
    ) from failure


def _found(model: nn.Module, call: Call) -> dict[str, Products]:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def ours(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else None, copy=True)

    args, kwargs = tree_map(ours, call)
    devices = [like.device] if like.is_cuda else []
    with _in_evaluation(model), torch.no_grad(), torch.random.fork_rng(devices), _Finder(model) as finder:
        finder.mark((args, kwargs), depending=True)
        model(*args, **kwargs)
    # Those of which nothing is quantized are kept too: else their products would count as their caller's.
    found = {name: products for name, products in finder.found.items() if products.plan}
    return found if any(any(products.plan) for products in found.values()) else {}


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without the modules' own ``train``, which may do more than set the mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Finder(Audit):
    """Follows what depends on the input, by the tensors that pass through functions.

    A tensor that no function has returned, and that is no Parameter and no buffer, comes out of something that shows no
    functions, such as a ``torch.autograd.Function``: it counts as depending.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: dict[str, Products] = {}
        self._calls: list[list[bool]] = []
        self._stack: list[nn.Module] = []
        self._handles: list[Any] = []
        # Whether a tensor depends on the input, of those that are known.
        self._depending = WeakTensorKeyDictionary()
        self.mark([*model.parameters(), *model.buffers()], depending=False)

    def mark(self, values: Any, depending: bool) -> None:
        """Note whether these depend on the input."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._depending[tensor] = depending

    def _depends(self, values: Any) -> bool:
        return any(isinstance(leaf, Tensor) and self._depending.get(leaf, True) for leaf in tree_leaves(values))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        # Such as zeros_like: of the argument's shape, not of its values.
        depends = not name.startswith("new_") and not name.endswith("_like") and self._depends((args, kwargs))
        # What is written to takes on what is written.
        self.mark(args[0] if func is Tensor.__setitem__ else out, depends)
        return out

    def __enter__(self) -> Self:
        # Hooks of these modules alone: whatever else runs in the process is not seen.
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._push))
            self._handles.append(module.register_forward_hook(self._pop, always_call=True))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()

    def _push(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)
        self._calls.append([])

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        # A forward that fails leaves those within it behind.
        while self._stack and self._stack.pop() is not module:
            self._calls.pop()
        made = self._calls.pop()
        # A module that is called again may go another way.
        products = self.found.setdefault(self._names[module], Products())
        longest = itertools.zip_longest(products.plan, made, fillvalue=False)
        products.plan = [before or now for before, now in longest]
        products.counts.add(len(made))

    def _product_of_two(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        fused = func is F.scaled_dot_product_attention
        operands = product_operands(func, args, kwargs)
        two = fused or len(operands) == 2
        numbers = all(operand.is_floating_point() for operand in operands)
        # What a layer multiplies by itself is its weight.
        counts = two and numbers and self._depends(operands) and not holds_weight(self._stack[-1])
        self._calls[-1].extend([counts] * (1 + fused))
