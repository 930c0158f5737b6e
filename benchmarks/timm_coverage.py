"""``python -m benchmarks.timm_coverage [MODULE ...]``: the smallest model of every timm module, quantized and trained.

Each is built with random weights (no download), attached with weights and activations at 4 bits, calibrated, audited,
trained for a step, evaluated, written as a packed file and read back, detached; then once more with ``attention=True``
where it multiplies activations. Rows are kept in ``results/timm_coverage.json`` as they come, so that a run that was
stopped goes on with the modules that are missing, and ``results/timm_coverage.md`` is written from them.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from timm.layers import DropPath
from timm.models import list_models, list_modules
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_lightning import CPQConfig, attach, calibrate, detach, levels, load_quantized
from cpq_lightning.attach.audit import Audit, AuditReport
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.products import modules_with_products, quantized_operands
from cpq_lightning.export.packed import write_packed
from cpq_lightning.files import write_atomically
from cpq_lightning.nn.quantizer import Quantizer

RESULTS = Path(__file__).parent / "results"
CONFIG = CPQConfig(weight_bits=4, act_bits=4)
WITH_ATTENTION = CPQConfig(weight_bits=4, act_bits=4, attention=True)
# Outputs of the same weights, relative to the largest: what rounding of floats may make of another order of sums.
TOLERANCE = 1e-4
# Relative change of the output that quantization makes at least.
LEAST_CHANGE = 1e-3
# Images smaller than a model's own, where it takes them: the weights are what is covered.
IMAGE, IMAGES = 128, 2


@dataclass
class Row:
    """What was seen of one model.

    Attributes:
        module: timm's module.
        model: Its model of fewest parameters.
        parameters: How many.
        image: Size of the images, (channels, height, width).
        sites: Quantized layers.
        unquantized: ``(module, operation, operand)`` of each product with a weight that was not quantized whole.
        products: Products of two activations in a forward: in full precision, unless ``attention=True``.
        change: Relative change of the output by quantization.
        problems: What is not as it should be, a sentence each.
        seconds: Of all of it.
    """

    module: str
    model: str
    parameters: int = 0
    image: tuple[int, ...] = ()
    sites: int = 0
    unquantized: list[tuple[str, str, str]] = field(default_factory=list)
    products: int = 0
    change: float = 0.0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def timm_modules() -> list[str]:
    """timm's own modules, among those that are registered with it."""
    return [
        m for m in sorted(list_modules()) if timm.model_entrypoint(list_models(module=m)[0]).__module__[:5] == "timm."
    ]


def smallest_model(module: str) -> str:
    """The model of fewest parameters of a timm module."""
    return min(list_models(module=module), key=_parameters)


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def cover(module: str, name: str, **arguments: Any) -> Row:
    """Take one model through everything; what goes wrong is in the row's ``problems``.

    ``arguments`` are ``timm.create_model``'s.
    """
    row = Row(module, name)
    begun = time.perf_counter()
    with warnings.catch_warnings():
        # What the audit warns of is in the row.
        warnings.simplefilter("ignore")
        try:
            _cover(row, arguments)
        except Exception as error:
            row.problems.append(f"{type(error).__name__}: {error}")
    row.seconds = time.perf_counter() - begun
    return row


def _cover(row: Row, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(row.model, **arguments)
    row.parameters = sum(p.numel() for p in model.parameters())
    images = torch.randn(IMAGES, *_image(model))
    row.image = tuple(images.shape[1:])
    _settle(model, images)
    full = _evaluated(model, images)

    calibrate(attach(model, CONFIG).train(), [images])
    row.sites = len(list(quantized_layers(model)))
    report = _audited(model, images)
    row.unquantized, row.products = report.unquantized, len(report.activation_products)
    if report.never_called:
        row.problems.append(f"never called: {report.never_called[:3]}")
    row.problems += _train(model, images, dict(quantizers(model)))

    quantized = _evaluated(model, images)
    row.change = float((quantized - full).norm() / full.norm())
    if not row.change >= LEAST_CHANGE:
        row.problems.append(f"the output changes by {row.change:.2g} only")
    if len(levels(model)) != len(list(quantizers(model))):
        row.problems.append("a quantizer is missing in the levels")
    with tempfile.TemporaryDirectory() as folder:
        path = write_packed(model, Path(folder) / "model", architecture={"timm": row.model, "arguments": arguments})
        row.problems += _compare("the packed file", _evaluated(load_quantized(path), images), quantized)

    for _, quantizer in quantizers(model):
        quantizer.configure(active=quantizer.kind == "weight")
    expected = _evaluated(model, images)
    row.problems += _compare("detach", _evaluated(detach(model), images), expected)
    if row.products:
        _cover_attention(row, model, images)


def _cover_attention(row: Row, model: nn.Module, images: Tensor) -> None:
    calibrate(attach(model, WITH_ATTENTION).train(), [images])
    # Such as rotary frequencies, which positions alone make.
    apart = {name for name, module in modules_with_products(model) if not any(module.product_plan)}
    left = [product for product in _audited(model, images).activation_products if product[0] not in apart]
    if left:
        row.problems.append(f"attention=True leaves {left[:3]}")
    row.problems += _train(model, images, dict(quantized_operands(model)))


def _image(model: nn.Module) -> tuple[int, ...]:
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    if cfg.get("fixed_input_size"):
        return channels, height, width
    return tuple(cfg.get("min_input_size") or (channels, min(height, IMAGE), min(width, IMAGE)))


@torch.no_grad()
def _settle(model: nn.Module, images: Tensor) -> None:
    """Bring random weights into a state that could be a trained one's: every layer matters, nothing overflows."""
    for module in model.modules():
        # Dropping whole paths of a batch of two would leave layers without a gradient.
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and not name.endswith("bias")
        if gain:
            # Gains that start at zero, and layer scales of 0.1 down to 1e-6, would hide the layers behind them.
            parameter.copy_(torch.where(parameter.abs() < 0.2, 1.0, parameter) * (0.5 + torch.rand_like(parameter)))
        elif parameter.dim() > 1 and not parameter.any():
            parameter.normal_(0, 0.02)
    for layer, calls in _calls(model.train(), images).items():
        # One that is applied again and again to its own sum, as CoaT's shared convolutions are, would explode.
        layer.weight.div_(calls)
    norms = {module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in norms.items():
        norm.momentum = momentum


def _calls(model: nn.Module, images: Tensor) -> dict[nn.Module, int]:
    """How often a forward calls each layer with a weight."""
    counts: dict[nn.Module, int] = {}

    def count(module: nn.Module, *_: object) -> None:
        counts[module] = counts.get(module, 0) + 1

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    return counts


@torch.no_grad()
def _evaluated(model: nn.Module, images: Tensor) -> Tensor:
    return _first(model.eval()(images))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _audited(model: nn.Module, images: Tensor) -> AuditReport:
    with Audit(model.eval()) as audit:
        model(images)
    return audit.report


def _train(model: nn.Module, images: Tensor, trained: dict[str, Quantizer]) -> Iterator[str]:
    """One step of SGD; what is wrong with the loss, or with the gradients of the quantizers."""
    output = model.train()(images)
    # Several heads of a model that distils are trained at once.
    heads = [output] if isinstance(output, Tensor) else list(output)
    loss = sum((head.flatten(1).log_softmax(1)[:, 0].mean().neg() for head in heads), torch.tensor(0.0))
    loss.backward()
    if not loss.isfinite():
        yield f"the loss is {loss.item()}"
    grads = {f"{name}.{part}": p.grad for name, q in trained.items() for part, p in q.named_parameters()}
    wrong = [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    still = [name for name, grad in grads.items() if name not in wrong and grad is not None and not grad.any()]
    if still:
        indifferent = _indifferent(model, images)
        still = [name for name in still if not name.startswith(indifferent)]
    for names, what in ((wrong, "none, or not finite"), (still, "zero")):
        if names:
            yield f"gradients are {what} in {len(names)}, such as {names[0]}"
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    model.zero_grad()


@torch.no_grad()
def _indifferent(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Names of the layers, and of what multiplies, that see the same values whatever the image: no loss moves them.

    csatv2's spatial attention is such: it begins with a LayerNorm over one channel, which returns its bias.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, quantizer in quantizers(model):
        if quantizer.kind == "activation":

            def see(module: nn.Module, args: tuple[Tensor], name: str = name.rpartition(".")[0]) -> None:
                seen.setdefault(f"{name}.", []).append(args[0].clone())

            handles.append(quantizer.register_forward_pre_hook(see))
    model(images)
    model(torch.randn_like(images))
    for handle in handles:
        handle.remove()
    calls = {name: (values[: len(values) // 2], values[len(values) // 2 :]) for name, values in seen.items()}
    return tuple(name for name, both in calls.items() if all(map(torch.allclose, *both)))


def _compare(what: str, actual: Tensor, expected: Tensor) -> Iterator[str]:
    gap = float((actual - expected).abs().max() / expected.abs().max())
    if not gap <= TOLERANCE:
        yield f"{what} differs by {gap:.2g}"


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| timm module | smallest model | parameters | image | layers | unquantized | products | outcome | seconds |",
        "|---|---|--:|--:|--:|---|--:|---|--:|",
    ]
    for row in rows:
        kinds = sorted({f"{op}: {operand}" for _, op, operand in row.unquantized})
        unquantized = f"{len(row.unquantized)} ({', '.join(kinds)})" if kinds else ""
        outcome = "; ".join(row.problems).replace("\n", " ").replace("|", "/") or "works"
        size = f"{row.parameters / 1e6:.2f} M | {'x'.join(map(str, row.image[1:]))} | {row.sites}"
        summary = f"{unquantized} | {row.products or ''} | {outcome}"
        lines.append(f"| {row.module} | {row.model} | {size} | {summary} | {row.seconds:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, show it, and write the table; returns how many models have problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="timm modules; all of them by default")
    parser.add_argument("--anew", action="store_true", help="run modules again that have a row")
    options = parser.parse_args(arguments)
    known = timm_modules()
    unknown = sorted(set(options.modules) - set(known))
    if unknown:
        parser.error(f"timm {timm.__version__} has no module {', '.join(unknown)}")
    console = Console()
    rows = {} if options.anew and not options.modules else _read()
    wanted = [m for m in options.modules or known if options.anew or m not in rows]
    for module in track(wanted, "timm coverage", console=console):
        row = cover(module, smallest_model(module))
        rows[module] = row
        _write({name: rows[name] for name in known if name in rows})
        console.print(
            f"{module}: {row.model}, {row.seconds:.1f} s. {'; '.join(row.problems) or 'works'}", soft_wrap=True
        )
        gc.collect()
    return sum(bool(row.problems) for row in rows.values())


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "timm")}}


def _read() -> dict[str, Row]:
    """Rows of an earlier run, where the same versions made them."""
    path = RESULTS / "timm_coverage.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("versions") != _versions():
        return {}
    return {row["module"]: Row(**row) for row in content["rows"]}


def _write(rows: dict[str, Row]) -> None:
    versions = _versions()
    content = {"versions": versions, "rows": [asdict(row) for row in rows.values()]}
    write_atomically(RESULTS / "timm_coverage.json", json.dumps(content, indent=1) + "\n")
    works = sum(not row.problems for row in rows.values())
    head = (
        "# What of timm works\n\n"
        f"The smallest model of each of timm's modules, by parameters: {works} of {len(rows)} work. Each is attached "
        "with weights and activations at 4 bits, calibrated, audited, trained for a step (a gradient that is finite "
        "and not zero in every quantizer), evaluated, written as a packed file and read back, and detached, random "
        "weights throughout. `unquantized` counts products with a weight of which one side stayed in full precision, "
        "`products` those of two activations, which `attention=True` quantizes; that is run too. Made by "
        "`python -m benchmarks.timm_coverage`.\n\n"
    )
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    write_atomically(
        RESULTS / "timm_coverage.md", f"{head}{table(list(rows.values()))}\n\n{named}; a shared machine.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
