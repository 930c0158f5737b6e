"""Find what a model multiplies without a layer, in one forward of it before it is quantized: two activations, or an
activation and a matrix among its Parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.calls import Call, as_call, copied_to, in_evaluation, restored
from cpq_lightning.attach.decomposed import Decomposed, Part, holder_of, is_plain, reads_itself
from cpq_lightning.attach.first_forward import auditable
from cpq_lightning.attach.matrix_products import as_layer_call, follow_matrix
from cpq_lightning.attach.origin import without_metrics
from cpq_lightning.attach.parameter_products import ProductsByLayers, layer_name
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.attach.torch_ops import product_operands
from cpq_lightning.attach.weight_readers import writes

if TYPE_CHECKING:
    from typing_extensions import Self

_REMEDY = (
    "give attach(..., example_inputs=batch), or set the LightningModule's example_input_array (for a QuantizedModule "
    "around another network: set it, and leave quantizing to CPQCallback)"
)


@dataclass
class Products:
    """The products of a module: see :class:`~cpq_lightning.attach.products.QuantizedProducts`."""

    plan: list[bool] = field(default_factory=list)
    counts: set[int] = field(default_factory=set)


@dataclass
class Found:
    """What one forward has shown.

    Attributes:
        products: The modules whose forward multiplies tensors without a layer, by name.
        matrices: The layers for matrices that a forward multiplies by: their parts, by name of the module that
            multiplies and of the layer.
        calls: The tensors that modules got and returned, for each call, by name of the module.
    """

    products: dict[str, Products] = field(default_factory=dict)
    matrices: dict[str, dict[str, Part]] = field(default_factory=dict)
    calls: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = field(default_factory=dict)


def has_matrices(model: nn.Module) -> bool:
    """Whether a model has Parameters that its forward may multiply by without a layer."""
    return bool(_matrices(model))


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    """The matrices among a model's Parameters that are not the weight of a layer."""
    taken, found = set(), set()
    for _, module in without_metrics(model):
        for key, parameter in module._parameters.items():
            if parameter is None or nn.parameter.is_lazy(parameter) or parameter.dim() != 2:
                continue
            weight_of_layer = holds_weight(module) and key == "weight"
            changes = getattr(module, "max_norm", None) is not None
            if weight_of_layer or changes or isinstance(module, Decomposed) or not parameter.is_floating_point():
                taken.add(parameter)
            else:
                found.add(parameter)
    return found - taken


def find_products(model: nn.Module, example_inputs: Any = None, record: Collection[str] = ()) -> Found:
    """Find the products of a model's forward that no layer makes.

    A product is quantized only if one of its operands depends on the input; rotary frequencies and tables that are
    looked up by position do not. The forward runs in evaluation, and does not change the model.

    Args:
        model: A model that is not quantized.
        example_inputs: Inputs of the forward: see :func:`~cpq_lightning.attach.calls.as_call`. Without them, a
            LightningModule's ``example_input_array`` is used, or timm backbones in the model are called with images of
            their default size.
        record: Names of the modules whose calls are recorded.

    Raises:
        ValueError: there are no inputs to call the model with, the call fails, or the model is compiled.
    """
    if not auditable(model):
        raise ValueError(
            "A forward is needed to find products without a layer, and compiled code shows nothing: compile the model "
            "afterwards."
        )
    given = example_inputs if example_inputs is not None else getattr(model, "example_input_array", None)
    if given is not None:
        try:
            return _products_of_forward(model, as_call(model, given), record)
        except Exception as error:
            raise ValueError(f"The forward with the example inputs fails ({error}).") from error
    found = Found()
    backbones = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "pretrained_cfg", None), Mapping)]
    if not backbones:
        raise ValueError(
            f"A forward of {type(model).__name__} is needed to find products without a layer, and its inputs are not "
            f"known: use a timm backbone, {_REMEDY}."
        )
    for name, backbone in backbones:
        prefix = f"{name}." if name else ""
        inside = [inner.removeprefix(prefix) for inner in record if f"{inner}.".startswith(prefix)]
        of_backbone = _products_of_backbone(name, backbone, ["" if inner == name else inner for inner in inside])
        for of_all, of_one in (
            (found.products, of_backbone.products),
            (found.matrices, of_backbone.matrices),
            (found.calls, of_backbone.calls),
        ):
            of_all.update({prefix + inner if inner else name: value for inner, value in of_one.items()})  # type: ignore[attr-defined]
    return found


def _products_of_backbone(name: str, backbone: nn.Module, record: Collection[str]) -> Found:
    cfg: Mapping[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = cfg["input_size"]
    convolution = next((m for m in backbone.modules() if isinstance(m, _ConvNd)), None)
    image_size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    # The backbone may have been built for other channels or another size than its config has.
    channel_counts = [channels] if convolution is None else [channels, convolution.in_channels]
    sizes = [(height, width)] if image_size is None else [tuple(image_size), (height, width)]
    failure: Exception | None = None
    for count, size in itertools.product(dict.fromkeys(channel_counts), dict.fromkeys(sizes)):
        try:
            return _products_of_forward(backbone, ((torch.zeros(1, count, *size),), {}), record)
        except Exception as error:
            failure = failure or error
    raise ValueError(
        f"A forward is needed to find products without a layer, and the backbone {name or type(backbone).__name__!r} "
        f"does not run on images of {sizes} ({failure}): {_REMEDY}."
    ) from failure


def _products_of_forward(model: nn.Module, call: Call, record: Collection[str]) -> Found:
    args, kwargs = copied_to(model, call)
    # With gradients, because a product without them, as of distances to a codebook, cannot train quantizers.
    with (
        in_evaluation(model),
        torch.enable_grad(),
        restored(model, [*model.buffers()]),
        _Finder(model, record) as finder,
    ):
        finder.mark((args, kwargs), depending=True)
        model(*args, **kwargs)
    # Modules without a quantized product are kept too, so that their products do not count as their caller's.
    by_name = {name: products for name, products in finder.products.items() if products.plan}
    quantized = any(any(products.plan) for products in by_name.values())
    return Found(by_name if quantized else {}, finder.layers_for_matrices(), finder.calls)


def _copies(values: Any) -> list[Tensor]:
    """The floating-point tensors among values."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return [tensor.detach().clone() for tensor in tensors if tensor.is_floating_point()]


def changed_modules(before: Found, after: Found) -> list[str]:
    """Names of the modules that return something else for the same inputs; inside of such a module, only the innermost.

    Args:
        before: What was found and recorded.
        after: The same after a change to the model that should not matter.
    """
    changed = [name for name, calls in before.calls.items() if _differ(calls, after.calls[name])]
    return [
        n for n in changed if not any(other != n and f"{other}.".startswith(f"{n}." if n else "") for other in changed)
    ]


def _differ(before: list[tuple[list[Tensor], list[Tensor]]], after: list[tuple[list[Tensor], list[Tensor]]]) -> bool:
    if len(before) != len(after):
        return True
    pairs = zip(before, after, strict=True)
    return any(_close(x, other_x) and not _close(y, other_y) for (x, y), (other_x, other_y) in pairs)


def _close(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether tensors are equal up to rounding; a layer may sum in another order."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return False
    for x, y in zip(before, after, strict=True):
        most = 10 * torch.finfo(x.dtype).eps ** 0.5 * float(x.abs().nan_to_num(posinf=0).max()) if x.numel() else 0.0
        if not torch.allclose(x, y, rtol=0, atol=most, equal_nan=True):
            return False
    return True


class _Finder(Audit):
    """Follow which tensors depend on the input, through all functions.

    A tensor that no function returned, and that is neither a Parameter nor a buffer, comes from code that shows no
    functions, such as a ``torch.autograd.Function``; it counts as dependent.
    """

    def __init__(self, model: nn.Module, record: Collection[str]) -> None:
        super().__init__(model)
        self.products: dict[str, Products] = {}
        self.calls: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {name: [] for name in record}
        self._calls: list[list[bool]] = []
        self._stack: list[nn.Module] = []
        self._handles: list[Any] = []
        # Whether a tensor depends on the input, for known tensors.
        self._depending = WeakTensorKeyDictionary()
        self.mark([*model.parameters(), *model.buffers()], depending=False)
        # Tensors with the values of a matrix: the matrix, and whether it is transposed.
        matrices = _matrices(model)
        self._matrices = WeakTensorKeyDictionary()
        self._matrices.update((matrix, (matrix, False)) for matrix in matrices)
        # The modules that multiply by a matrix, and whether its outputs come first there.
        self._uses: dict[nn.Parameter, set[tuple[nn.Module | None, bool]]] = {}
        self._versions = {matrix: matrix._version for matrix in matrices}

    def mark(self, values: Any, depending: bool) -> None:
        """Record whether tensors depend on the input."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._depending[tensor] = depending

    def _depends(self, values: Any) -> bool:
        return any(isinstance(leaf, Tensor) and self._depending.get(leaf, True) for leaf in tree_leaves(values))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        self._follow_matrix(func, args, kwargs or {}, out)
        name = getattr(func, "__name__", "")
        # Functions such as zeros_like use the shape of the argument, not its values.
        depends = not name.startswith("new_") and not name.endswith("_like") and self._depends((args, kwargs))
        # A tensor that is written to depends on what is written.
        self.mark(args[0] if func is Tensor.__setitem__ else out, depends)
        return out

    def __enter__(self) -> Self:
        # Hooks on these modules only, so that other modules in the process are not seen.
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
        # A forward that fails leaves the forwards inside of it on the stack.
        while self._stack and self._stack.pop() is not module:
            self._calls.pop()
        made = self._calls.pop()
        # A module that is called several times may take different paths.
        products = self.products.setdefault(self._names[module], Products())
        longest = itertools.zip_longest(products.plan, made, fillvalue=False)
        products.plan = [before or now for before, now in longest]
        products.counts.add(len(made))
        if self._names[module] in self.calls:
            self.calls[self._names[module]].append((_copies(args), _copies(output)))

    def _product_of_two(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if not self._stack:
            # In a root's __call__, outside of its forward.
            return
        fused = func is F.scaled_dot_product_attention
        operands = product_operands(func, args, kwargs)
        two_operands = fused or len(operands) == 2
        floating_point = all(operand.is_floating_point() for operand in operands)
        # A product in a layer's forward is with its weight, which its weight quantizer quantizes.
        counts = two_operands and floating_point and self._depends(operands) and not holds_weight(self._stack[-1])
        self._calls[-1].extend([counts] * (1 + fused))

    def _follow_matrix(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note which module multiplies by a matrix."""
        first = args[0] if args else None
        if isinstance(first, Tensor) and first in self._matrices and isinstance(out, Tensor):
            transposes = follow_matrix(func, args, kwargs)
            if transposes is not None:
                matrix, transposed = self._matrices[first]
                # A product in a wider type is not that of a layer.
                if torch.promote_types(out.dtype, matrix.dtype) == matrix.dtype:
                    self._matrices[out] = (matrix, transposed != transposes)
                return
            if writes(func) and first is not self._matrices[first][0]:
                del self._matrices[first]
                return
        call = as_layer_call(func, args, kwargs, lambda value: isinstance(value, Tensor) and value in self._matrices)
        if call is not None and self._depends(call.input):
            matrix, transposed = self._matrices[call.matrix]
            inner = (module for module in reversed(self._stack) if any(p is matrix for p in module.parameters()))
            module = next(inner, None) if torch.is_grad_enabled() else None
            self._uses.setdefault(matrix, set()).add((module, call.outputs_first != transposed))

    def layers_for_matrices(self) -> dict[str, dict[str, Part]]:
        """See :class:`Found`. What has no single module and layout, or is rewritten in the forward, is left out."""
        holders = [(m, key, p) for m in self._names for key, p in m._parameters.items() if p is not None]
        found: dict[str, dict[str, Part]] = {}
        for matrix, uses in self._uses.items():
            (module, outputs_first), *others = uses
            if module is None or others or matrix._version != self._versions[matrix]:
                continue
            if isinstance(module, Decomposed) or "forward" in module.__dict__:
                continue
            paths = [path for path, p in module.named_parameters(remove_duplicate=False) if p is matrix]
            part = Part(next(iter(paths), ""), transposed=not outputs_first)
            name = layer_name(part.weight, outputs_first)
            readers = {holder for holder, _, p in holders if p is matrix}
            tables = {holder for holder in readers if type(holder) is nn.Embedding}
            # Other names of the Parameter would not follow the layer; an embedding's rows are the outputs of a layer.
            single = sum(p is matrix for _, _, p in holders) == max(1, len(readers))
            single = single and len(readers - tables) <= 1 and (outputs_first or not tables)
            if not paths or not single or not is_plain(module, {name: part}):
                continue
            holder, _ = holder_of(module, part.weight)
            if not reads_itself(module, holder) or holder in tables:
                found.setdefault(self._names[module], {})[name] = part
        # In the order in which a state builds them again.
        ordered = {name: ProductsByLayers.parts_named(self.model.get_submodule(name), found[name]) for name in found}
        return {name: parts for name, parts in ordered.items() if parts}
