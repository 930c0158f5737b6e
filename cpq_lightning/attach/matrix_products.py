"""Products of a tensor with one matrix, in the many ways that torch writes them, as the call of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Functions of two operands, with the dimension of the right one that is summed over: 0 is its first dimension.
_BINARY: dict[Any, int] = dict.fromkeys(
    (
        torch.matmul, torch.mm, torch.mv, torch.linalg.matmul,
        Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__, Tensor.__rmatmul__,
    ),
    0,
) | dict.fromkeys((torch.inner, Tensor.inner, F.linear), 1)  # fmt: skip
_ADDING: dict[Any, None] = dict.fromkeys((torch.addmm, Tensor.addmm, torch.addmv, Tensor.addmv))
_TRANSPOSED: dict[Any, None] = dict.fromkeys(
    getattr(Tensor, name).__get__
    for name in ("T", "mT", "H", "mH")  # complex matrices are no weights
)
# Traced code shows the properties under the last four of these names.
_TRANSPOSES = ("t", "numpy_T", "mT", "mH", "matrix_H")
_SWAPS = ("transpose", "swapaxes", "swapdims")
_SAME = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone")


class LayerCall(NamedTuple):
    """A product as the call of a linear layer with the matrix as its weight.

    Attributes:
        matrix: The operand that is the matrix.
        outputs_first: Whether the matrix has the shape (outputs, inputs); else it is (inputs, outputs).
        input: The layer's input, shape (..., inputs).
        finish: Computes the product from the layer's output, shape (..., outputs).
    """

    matrix: Tensor
    outputs_first: bool
    input: Tensor
    finish: Callable[[Tensor], Tensor]


def as_layer_call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_matrix: Callable[[Any], bool]
) -> LayerCall | None:
    """A call as that of a linear layer; ``None`` if it is no product of one tensor with one matrix.

    Args:
        func: A function of torch, as a function mode sees it.
        args: Its arguments.
        kwargs: Its arguments by name.
        is_matrix: Whether an argument is the matrix, which has two dimensions.
    """
    if kwargs.get("out") is not None:
        return None
    call = None
    if func in _BINARY:
        call = _of_two(func, args, kwargs, is_matrix)
    elif func in _ADDING:
        call = _adding(func, args, kwargs, is_matrix)
    elif func is torch.einsum:
        call = _of_einsum(args, is_matrix)
    # A sparse input cannot be quantized, and the weight of a layer is real.
    usable = call is not None and call.input.layout is torch.strided and not call.input.is_complex()
    return call if usable else None


def follow_matrix(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether a function of a matrix transposes it; ``None`` if its result is not the same matrix."""
    kind = _kind_of(func)
    if kind == "swap":
        return len({dim % 2 for dim in (*args[1:], *kwargs.values())}) == 2
    if kind == "permute":
        order = args[1:] if len(args) > 2 else next(iter((*args[1:], *kwargs.values())))
        return [dim % 2 for dim in order] == [1, 0]
    return None if kind is None else kind == "transpose"


@torch.compiler.assume_constant_result
def _kind_of(func: Any) -> str | None:
    name = getattr(func, "__name__", "")
    if name in _TRANSPOSES or func in _TRANSPOSED:
        return "transpose"
    return "same" if name in _SAME else "swap" if name in _SWAPS else name if name == "permute" else None


def _unchanged(out: Tensor) -> Tensor:
    return out


def _of_two(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_matrix: Callable[[Any], bool]) -> Any:
    names = ("input", "weight" if func is F.linear else "vec" if func in (torch.mv, Tensor.mv) else "other")
    if func in (torch.mm, Tensor.mm):
        names = ("input", "mat2")
    values = [*args[:2], *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(values) < 2:
        return None
    left, right = reversed(values) if func is Tensor.__rmatmul__ else values
    summed = _BINARY[func]
    bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if func is F.linear else None
    if is_matrix(right) and not is_matrix(left):
        finish = _unchanged if bias is None else lambda out: out + bias.to(out.dtype)
        return LayerCall(right, summed == 1, left, finish)
    if not is_matrix(left) or is_matrix(right) or bias is not None:
        return None
    return _matrix_on_the_left(left, right, summed)


def _matrix_on_the_left(matrix: Tensor, x: Tensor, summed: int) -> LayerCall | None:
    """The product of a matrix with a tensor of which the last dimension but one is summed over, or the last."""
    if x.dim() == 1:
        return LayerCall(matrix, True, x, _unchanged)
    if summed == 1 and x.dim() > 2:
        # The outputs come first, then all dimensions of the other tensor.
        return LayerCall(matrix, True, x, lambda out: out.movedim(-1, 0))
    return LayerCall(matrix, True, x if summed == 1 else x.mT, lambda out: out.mT)


def _adding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_matrix: Callable[[Any], bool]) -> Any:
    """``beta · added + alpha · left · right``."""
    vector = func in (torch.addmv, Tensor.addmv)
    names = ("input", "mat", "vec") if vector else ("input", "mat1", "mat2")
    values = [*args[:3], *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(values) < 3:
        return None
    added, left, right = values
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    call = _of_two(torch.mv if vector else torch.mm, (left, right), {}, is_matrix)
    if call is None:
        return None

    def finish(out: Tensor) -> Tensor:
        product = call.finish(out)
        product = product if alpha == 1 else alpha * product
        # Under autocast, the product has another type.
        given = added.to(out.dtype)
        return product if beta == 0 else given + product if beta == 1 else beta * given + product

    return call._replace(finish=finish)


def _of_einsum(args: tuple[Any, ...], is_matrix: Callable[[Any], bool]) -> LayerCall | None:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2:
        return None
    which = [index for index, operand in enumerate(operands) if is_matrix(operand)]
    if len(which) != 1:
        return None
    matrix, x = operands[which[0]], operands[1 - which[0]]
    terms = _terms(args[0], x.dim(), which[0])
    if terms is None:
        return None
    of_matrix, of_x, out = terms
    summed = [letter for letter in of_matrix if letter in of_x and letter not in out]
    outputs = [letter for letter in of_matrix if letter not in of_x and letter in out]
    kept = [letter for letter in of_x if letter not in summed]
    if len(summed) != 1 or len(outputs) != 1 or sorted(out) != sorted([*kept, *outputs]):
        return None
    given = [*kept, *outputs]
    order = [given.index(letter) for letter in out]
    input = x.movedim(of_x.index(summed[0]), -1)
    return LayerCall(matrix, of_matrix[0] == outputs[0], input, lambda out: out.permute(order))


def _terms(equation: str, dims: int, which: int) -> tuple[list[str], list[str], list[str]] | None:
    """The letters of the matrix, of the other operand and of the result, an ellipsis written out.

    Args:
        equation: Of an einsum of two operands.
        dims: Dimensions of the operand that is not the matrix.
        which: Index of the matrix.
    """
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    of_matrix, of_x = terms[which], terms[1 - which]
    if not arrow:
        letters = sorted(letter for letter in set(given) - set(",.") if given.count(letter) == 1)
        result = ("..." if "..." in of_x else "") + "".join(letters)
    elided = dims - len(of_x.replace("...", ""))
    # Numbers are no letters of an equation.
    more = [str(index) for index in range(elided)] if "..." in of_x else []
    written = [_written_out(term, more) for term in (of_matrix, of_x, result)]
    unique = all(len(set(term)) == len(term) for term in written)
    if "..." in of_matrix or len(written[0]) != 2 or len(written[1]) != dims or not unique:
        return None
    return written[0], written[1], written[2]


def _written_out(term: str, more: list[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(more if dots else []), *after]
