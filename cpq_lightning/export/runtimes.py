"""Packed files and ``torch.export`` programs, loaded in PyTorch for verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from cpq_lightning.export.calls import flat_outputs
from cpq_lightning.export.integer_model import InputGrid, input_of, with_input
from cpq_lightning.export.load import build
from cpq_lightning.export.program import read_program
from cpq_lightning.export.read import read_packed
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.verify import Place


class InTorch:
    """Base class of artefacts that PyTorch runs as a module; a subclass gives the codes and the grids."""

    module: nn.Module
    runtime = f"PyTorch {torch.__version__}"
    tolerance = 1e-5

    def grids(self) -> Iterator[tuple[str, nn.Module, InputGrid]]:
        """The name, the module and the grid of each quantizer of an input."""
        raise NotImplementedError

    def negated_by(self) -> Mapping[str, str]:
        return {}

    def remedy(self) -> None:
        return None

    @torch.no_grad()
    def outputs(self, batch: Samples) -> list[Tensor]:
        args, kwargs = batch.call()
        return flat_outputs(self.module(*args, **kwargs))

    @torch.no_grad()
    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        codes: dict[Place, Tensor] = {}
        with ExitStack() as stack:
            for name, module, grid in self.grids():
                hook = _substitute(name, grid, given, codes)
                stack.callback(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
            return codes, self.outputs(batch)


class PackedArtefact(InTorch):
    """A packed file, as :func:`~cpq_lightning.load_quantized` loads it.

    Args:
        path: The file.
        model: The network without quantization; required where the file names no architecture.
    """

    def __init__(self, path: Path, model: nn.Module | None = None) -> None:
        content = read_packed(path)
        self._codes = {layer["name"]: content.codes(layer) for layer in content.header["layers"]}
        self.module = build(content, path, model)

    def weight_codes(self) -> dict[str, Tensor]:
        return self._codes

    def grids(self) -> Iterator[tuple[str, nn.Module, InputGrid]]:
        for name, layer in self.module.named_modules():
            grid = layer._modules.get("input_grid")
            if isinstance(grid, InputGrid):
                yield name, layer, grid


def _substitute(name: str, grid: InputGrid, given: Mapping[Place, Tensor], codes: dict[Place, Tensor]) -> Any:
    """A pre-hook that stores the codes of a layer's input and replaces the input by the given value, if any."""
    count = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal count
        place = (name, count)
        count += 1
        x = input_of(args, kwargs)
        codes[place] = grid.codes(x).short()
        return with_input(given.get(place, x), args, kwargs)

    return hook


class ProgramArtefact(InTorch):
    """A ``torch.export`` program."""

    runtime = f"torch.export of PyTorch {torch.__version__}"

    def __init__(self, path: Path) -> None:
        self.program = read_program(path)
        self.module = self.program.module()

    def weight_codes(self) -> dict[str, Tensor]:
        suffix = ".weight_codes"
        tensors = {**self.program.state_dict, **self.program.constants}
        return {name.removesuffix(suffix): value for name, value in tensors.items() if name.endswith(suffix)}

    @torch.no_grad()
    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        interpreter = _Interpreter(self.program, given)
        outputs = interpreter.run_on(batch)
        return interpreter.codes, outputs


class _Interpreter(fx.Interpreter):
    """Runs a program node by node, stores the codes of each layer's input, and replaces inputs by given values.

    The division of an input by its scale marks the beginning of its quantization.
    """

    def __init__(self, program: ExportedProgram, given: Mapping[Place, Tensor]) -> None:
        super().__init__(program.graph_module)
        self._graph = program.graph_module.graph
        self.given = given
        self.codes: dict[Place, Tensor] = {}
        signature = program.graph_signature
        self._names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self._arguments = {**self._names, **signature.inputs_to_parameters}
        self._tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
        self._counts: dict[str, int] = {}

    def run_on(self, batch: Samples) -> list[Tensor]:
        # Constants are arguments of the program, too.
        arguments = iter(tree_leaves(batch.call()))
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        outputs = self.run(
            *(
                self._tensors[self._arguments[node.name]] if node.name in self._arguments else next(arguments)
                for node in placeholders
            )
        )
        return flat_outputs(outputs)

    def run_node(self, n: fx.Node) -> Any:
        layer = self._divides_input_of(n)
        if layer is not None:
            source = n.args[0]
            assert isinstance(source, fx.Node)
            place = (layer, self._counts.get(layer, 0))
            self._counts[layer] = place[1] + 1
            self.codes[place] = self._compute_codes(n).short()
            if place in self.given:
                self.env[source] = self.given[place].clone()
        return super().run_node(n)

    def _divides_input_of(self, node: fx.Node) -> str | None:
        if node.target is not torch.ops.aten.div.Tensor or not isinstance(node.args[1], fx.Node):
            return None
        name = self._names.get(node.args[1].name, "")
        suffix = ".input_grid.step"
        return name.removesuffix(suffix) if name.endswith(suffix) else None

    def _compute_codes(self, division: fx.Node) -> Tensor:
        """The codes by the operations of the program: division, rounding and clamp."""
        value, node = super().run_node(division), division
        for target in (torch.ops.aten.round.default, torch.ops.aten.clamp.default):
            node = next(user for user in node.users if user.target is target)
            value = target(value, *node.args[1:], **node.kwargs)
        return value
