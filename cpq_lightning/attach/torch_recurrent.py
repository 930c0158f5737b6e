"""``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells through layers: one for the input and one for the hidden state of
each layer and direction, and one for the projection of an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cpq_lightning.attach.decomposed import Decomposed, ParameterLayer, Part
from cpq_lightning.nn.autograd import Connect
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import watchers

# A layer as a function of its input.
Product = Callable[[Tensor], Tensor]
# The hidden state, and the cell state of an LSTM, shape (batch, features) each.
State = tuple[Tensor, ...]


class _Recurrent(Decomposed):
    """Base of both mixins: a module whose layers are called in each time step."""

    @classmethod
    def beside(cls, layer: str) -> tuple[str, ...]:
        return (layer.removesuffix("_reverse"), layer.removesuffix("_reverse") + "_reverse")

    @property
    def runs_fused(self) -> bool:
        """Whether torch's own forward computes the same: no quantizer is active, and nobody watches."""
        layers = [self._modules[name] for name in self.owned_layers]
        active = any(isinstance(m, Quantizer) and m.active for layer in layers if layer for m in layer.modules())
        return not active and not watchers() and all(isinstance(layer, ParameterLayer) for layer in layers)

    def connected(self, x: Tensor) -> Tensor:
        """``x`` with the parameters of all inactive quantizers in its graph, as DistributedDataParallel needs."""
        return Connect.of(x, *(p for name in self.owned_layers for p in self.get_submodule(name).parameters()))


class RecurrentByLayers(_Recurrent):
    """Mixin that computes a recurrent module step by step through ``ih_l0``, ``hh_l0``, and so on.

    The names are those of torch's Parameters without ``weight_``; ``hr_l0`` is the projection of an LSTM. The input is
    multiplied once for all steps, and the weight of the hidden state is quantized once for all steps. As long as no
    quantizer is active, torch's fused kernel runs.
    """

    stock: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNN, nn.LSTM, nn.GRU)

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part]:
        # All names, of Parameters that are shared or computed too.
        return _parts(cast(nn.RNNBase, module)._flat_weights_names)

    @classmethod
    def forward_for(cls, stock: type[nn.Module]) -> Callable[..., Any]:
        def forward(self: RecurrentByLayers, input: Any, hx: Any = None) -> Any:
            self.claim_layers()
            if self.runs_fused:
                if isinstance(input, PackedSequence):
                    return stock.forward(self, input._replace(data=self.connected(input.data)), hx)
                return stock.forward(self, self.connected(input), hx)
            return _recur(self, input, hx)

        return forward


class CellByLayers(_Recurrent):
    """Mixin that computes a recurrent cell through ``ih`` and ``hh``."""

    stock: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part]:
        names = [f"{kind}_{end}" for kind in ("weight", *(["bias"] if module.bias else [])) for end in ("ih", "hh")]
        return _parts(names)

    @classmethod
    def forward_for(cls, stock: type[nn.Module]) -> Callable[..., Any]:
        def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
            self.claim_layers()
            if self.runs_fused:
                return stock.forward(self, self.connected(input), hx)
            is_lstm = isinstance(self, nn.LSTMCell)
            states = None if hx is None else tuple(hx) if is_lstm else (hx,)
            _check_cell(self, input, states)
            if states is None:
                zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
                states = (zeros,) * (1 + is_lstm)
            states = _step_of(self)(self.ih(input), states, _product(self.hh), None)
            return states if is_lstm else states[0]

        return forward


def _parts(names: Sequence[str]) -> dict[str, Part]:
    kinds = [name.removeprefix("weight_") for name in names if name.startswith("weight_")]
    biases = {kind: f"bias_{kind}" if f"bias_{kind}" in names else None for kind in kinds}
    return {kind: Part(f"weight_{kind}", bias) for kind, bias in biases.items()}


def _product(layer: nn.Module) -> Product:
    prepared = getattr(layer, "prepared", None)
    return layer if prepared is None else prepared()


def _recur(module: Any, input: Tensor | PackedSequence, hx: Any) -> Any:
    """The forward of a recurrent module through its layers, with the arguments and results of torch's."""
    is_lstm, directions = isinstance(module, nn.LSTM), 1 + module.bidirectional
    packed = input if isinstance(input, PackedSequence) else None
    x = input.data if isinstance(input, PackedSequence) else input
    sizes = None if packed is None else packed.batch_sizes.tolist()
    time_dim = 1 if module.batch_first else 0
    is_batched = packed is not None or x.dim() == 3
    _check_input(module, x, (2,) if packed is not None else (2, 3))
    if not is_batched:
        x = x.unsqueeze(1 - time_dim)
    if packed is None and not x.shape[time_dim]:
        raise ValueError(f"input of {_name(module)}: expected at least one step, got the shape {tuple(x.shape)}.")
    batch = x.shape[1 - time_dim] if sizes is None else sizes[0]
    if hx is None:
        hidden = module.proj_size or module.hidden_size
        states = [x.new_zeros(module.num_layers * directions, batch, hidden)]
        states += [x.new_zeros(module.num_layers * directions, batch, module.hidden_size)] * is_lstm
    else:
        states = list(hx) if is_lstm else [hx]
        states = states if is_batched else [state.unsqueeze(1) for state in states]
        if packed is not None and packed.sorted_indices is not None:
            states = [state.index_select(1, packed.sorted_indices) for state in states]
        sizes_of = (module.get_expected_hidden_size, *([module.get_expected_cell_size] if is_lstm else []))
        for state, expected in zip(states, sizes_of, strict=True):
            # torch's own check, and its message.
            module.check_hidden_size(state, expected(x, None if packed is None else packed.batch_sizes))
    last: list[State] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}" + "_reverse" * direction
            start = tuple(state[layer * directions + direction] for state in states)
            out, end = _run(module, suffix, x, sizes, time_dim, start)
            outputs.append(out)
            last.append(end)
        x = torch.cat(outputs, -1) if directions > 1 else outputs[0]
        if layer < module.num_layers - 1:
            x = F.dropout(x, module.dropout, module.training)
    ends = [torch.stack(state) for state in zip(*last, strict=True)]
    if packed is not None:
        if packed.unsorted_indices is not None:
            ends = [state.index_select(1, packed.unsorted_indices) for state in ends]
        return packed._replace(data=x), tuple(ends) if is_lstm else ends[0]
    if not is_batched:
        x, ends = x.squeeze(1 - time_dim), [state.squeeze(1) for state in ends]
    return x, tuple(ends) if is_lstm else ends[0]


def _run(
    module: nn.Module, suffix: str, x: Tensor, sizes: list[int] | None, time_dim: int, states: State
) -> tuple[Tensor, State]:
    """One layer in one direction.

    Args:
        module: The recurrent module.
        suffix: Of the names of the layers, such as ``"l0_reverse"``.
        x: The input: all steps along ``time_dim``, or one after the other, of the lengths ``sizes``.
        sizes: Number of sequences in each step, falling, for a packed sequence.
        time_dim: Dimension of the steps where ``sizes`` is ``None``.
        states: The states before the first step.

    Returns:
        The hidden states of all steps, in the layout of ``x``; the states after the last step of each sequence.
    """
    gates = module.get_submodule(f"ih_{suffix}")(x)
    steps = gates.unbind(time_dim) if sizes is None else gates.split(sizes)
    multiply = _product(module.get_submodule(f"hh_{suffix}"))
    projection = module._modules.get(f"hr_{suffix}")
    project = None if projection is None else _product(projection)
    step = _step_of(module)
    outputs: list[Tensor] = []
    backwards = suffix.endswith("_reverse")
    for gate in reversed(steps) if backwards else steps:
        if sizes is None:
            states = step(gate, states, multiply, project)
            outputs.append(states[0])
            continue
        # Sequences that have ended, or not begun yet, keep their states.
        size = len(gate)
        done = step(gate, tuple(state[:size] for state in states), multiply, project)
        outputs.append(done[0])
        states = tuple(torch.cat([new, old[size:]]) for new, old in zip(done, states, strict=True))
    outputs = outputs[::-1] if backwards else outputs
    return torch.stack(outputs, time_dim) if sizes is None else torch.cat(outputs), states


def _step_of(module: nn.Module) -> Callable[[Tensor, State, Product, Product | None], State]:
    """The function of one step: what the input gives to the gates, the states, and the products of the hidden state."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _lstm_step
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _gru_step
    return _relu_step if getattr(module, "nonlinearity", "tanh") == "relu" else _tanh_step


def _lstm_step(gates: Tensor, states: State, multiply: Product, project: Product | None) -> State:
    hidden, cell = states
    i, f, g, o = (gates + multiply(hidden)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return hidden if project is None else project(hidden), cell


def _gru_step(gates: Tensor, states: State, multiply: Product, project: Product | None) -> State:
    (hidden,) = states
    reset, update, new = gates.chunk(3, -1)
    hidden_reset, hidden_update, hidden_new = multiply(hidden).chunk(3, -1)
    update = (update + hidden_update).sigmoid()
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return (new + update * (hidden - new),)


def _tanh_step(gates: Tensor, states: State, multiply: Product, project: Product | None) -> State:
    return ((gates + multiply(states[0])).tanh(),)


def _relu_step(gates: Tensor, states: State, multiply: Product, project: Product | None) -> State:
    return ((gates + multiply(states[0])).relu(),)


def _name(module: nn.Module) -> str:
    return next(cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch."))


def _check_input(module: Any, x: Tensor, allowed: tuple[int, ...]) -> None:
    if x.dim() not in allowed or x.shape[-1] != module.input_size:
        expected = " or ".join(f"{n}-D" for n in allowed)
        raise ValueError(
            f"input of {_name(module)}: expected {expected} with {module.input_size} features at the end, got the "
            f"shape {tuple(x.shape)}."
        )


def _check_cell(module: nn.Module, input: Tensor, states: State | None) -> None:
    _check_input(module, input, (1, 2))
    for state in states or ():
        if state.shape[:-1] != input.shape[:-1]:
            raise ValueError(
                f"hx of {_name(module)}: expected the shape {(*input.shape[:-1], state.shape[-1])} beside an "
                f"input of shape {tuple(input.shape)}, got {tuple(state.shape)}."
            )
