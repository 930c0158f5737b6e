"""``python -m benchmarks.model_coverage [MODEL ...]``: how much of published models is quantized, unchanged.

Each is built small, with random weights (no download), attached with weights and activations at 4 bits, attention's
products too, nothing left out; calibrated, and run backward once. Models whose package is missing are skipped, and
their rows stay. ``results/coverage.md`` is written from the rows in ``results/coverage.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cpq_lightning import CPQConfig, attach, calibrate, coverage
from cpq_lightning.attach import quantizers
from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.calls import as_call
from cpq_lightning.files import write_atomically

RESULTS = Path(__file__).parent / "results"
CONFIG = CPQConfig(weight_bits=4, act_bits=4, attention=True, first_last_bits=None)


@dataclass
class Row:
    """What was seen of one model.

    Attributes:
        model: Its name.
        package: The package that has it, with the version.
        parameters: Number of its parameters, in the small form.
        weights: Share of the weights' elements that are quantized, 0 to 1.
        macs: Share of the multiply-accumulates with both operands quantized, 0 to 1.
        counted: Multiply-accumulates of the full-precision forward by torch's ``FlopCounterMode``, relative to those
            that the share is of; below 1 where torch does not count an operation.
        left: What stays in full precision, with its share of the multiply-accumulates, the largest first.
        without_gradient: Quantizers without a gradient in a backward.
    """

    model: str
    package: str
    parameters: int
    weights: float
    macs: float
    counted: float
    left: list[tuple[str, float]] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)


def _vit() -> tuple[nn.Module, Any]:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), torch.randn(2, 3, 32, 32)


def _swin() -> tuple[nn.Module, Any]:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10), torch.randn(2, 3, 64, 64)


def _ssdlite() -> tuple[nn.Module, Any]:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    made = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return made, ([torch.rand(3, 320, 320), torch.rand(3, 320, 320)],)


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 99, (2, 12))}


_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_SMALL)), _tokens()


def _gpt2() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    made = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False))
    return made, _tokens()


def _t5() -> tuple[nn.Module, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False)
    inputs = {**_tokens(), "decoder_input_ids": torch.randint(0, 99, (2, 6))}
    return T5ForConditionalGeneration(config), inputs


def _hf_vit() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    small = {**_SMALL, "image_size": 32, "patch_size": 8}
    del small["vocab_size"]
    return ViTForImageClassification(ViTConfig(**small)), {"pixel_values": torch.randn(2, 3, 32, 32)}


def _wav2vec2() -> tuple[nn.Module, Any]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    layers = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(**_SMALL, **layers, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    return Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 800)}


def _tft() -> tuple[nn.Module, Any]:
    from pytorch_forecasting import TemporalFusionTransformer
    from pytorch_forecasting.data.encoders import TorchNormalizer
    from pytorch_forecasting.metrics import QuantileLoss

    made = TemporalFusionTransformer(
        hidden_size=16,
        attention_head_size=4,
        loss=QuantileLoss(),
        static_categoricals=["series"],
        time_varying_reals_encoder=["time", "value"],
        time_varying_reals_decoder=["time"],
        x_reals=["time", "value"],
        x_categoricals=["series"],
        embedding_sizes={"series": (4, 3)},
        embedding_paddings=[],
        output_transformer=TorchNormalizer(),
    )
    history, future = torch.full((2,), 12), torch.full((2,), 4)
    inputs = {"encoder_lengths": history, "decoder_lengths": future, "target_scale": torch.rand(2, 2)}
    for part, steps in (("encoder", 12), ("decoder", 4)):
        inputs[f"{part}_cat"] = torch.randint(0, 4, (2, 1)).expand(2, steps)[..., None]
        inputs[f"{part}_cont"] = torch.randn(2, steps, 2)
    return made, inputs


def _unet() -> tuple[nn.Module, Any]:
    from segmentation_models_pytorch import Unet

    return Unet("mobilenet_v2", encoder_weights=None, classes=3), torch.randn(2, 3, 64, 64)


def _rf_detr() -> tuple[nn.Module, Any]:
    from rfdetr.config import RFDETRNanoConfig
    from rfdetr.models import build_model_from_config

    config = RFDETRNanoConfig(
        resolution=128, positional_encoding_size=8, num_classes=3, num_queries=20, num_select=20, group_detr=1,
        pretrain_weights=None,
    )  # fmt: skip
    return build_model_from_config(config), torch.rand(2, 3, 128, 128)


# The package, and what builds a model with inputs of one call.
MODELS: Mapping[str, tuple[str, Callable[[], tuple[nn.Module, Any]]]] = {
    "VisionTransformer (of vit_b_16)": ("torchvision", _vit),
    "SwinTransformer (of swin_t)": ("torchvision", _swin),
    "ssdlite320_mobilenet_v3_large": ("torchvision", _ssdlite),
    "BertForSequenceClassification": ("transformers", _bert),
    "GPT2LMHeadModel": ("transformers", _gpt2),
    "T5ForConditionalGeneration": ("transformers", _t5),
    "ViTForImageClassification": ("transformers", _hf_vit),
    "Wav2Vec2ForCTC": ("transformers", _wav2vec2),
    "TemporalFusionTransformer": ("pytorch_forecasting", _tft),
    "Unet (encoder mobilenet_v2)": ("segmentation_models_pytorch", _unet),
    "RF-DETR Nano": ("rfdetr", _rf_detr),
}


def cover(name: str) -> Row:
    """Quantize a model and measure."""
    package, build = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    args, kwargs = as_call(model, inputs)
    # With gradients, torch takes no fused path, which is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    parameters = sum(p.numel() for p in model.parameters())
    with warnings.catch_warnings():
        # What they warn of is in the row.
        warnings.simplefilter("ignore")
        attach(model, CONFIG, example_inputs=inputs)
        # A batch is a tuple whose first element is the input.
        calibrate(model, [(inputs,)] if isinstance(inputs, dict) else [inputs])
        found = coverage(model, example_inputs=inputs)
        with torch.no_grad(), Audit(model.eval()) as audit:
            model(*args, **kwargs)
        without = _without_gradient(model, args, kwargs)
    ours = sum(macs for macs, _ in audit.report.products.values())
    return Row(
        name,
        f"{package} {version(package)}",
        parameters,
        found.weights,
        found.macs,
        counter.get_total_flops() / 2 / ours,
        [(part, left.macs) for part, left in found.left.items() if left.macs],
        without,
    )


def _without_gradient(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the quantizers that get no gradient from the outputs."""
    # In evaluation, because detectors want targets in training.
    outputs = [t for t in tree_leaves(_plain(model(*args, **kwargs))) if isinstance(t, Tensor) and t.requires_grad]
    torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    return [name for name, q in quantizers(model) if any(p.grad is None for p in q.parameters())]


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def table(rows: Mapping[str, Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | package | parameters | weights | multiply-accumulates | what is left | torch counts |",
        "|---|---|--:|--:|--:|---|--:|",
    ]
    for row in rows.values():
        left = "; ".join(f"{name} ({share:.1%})" for name, share in row.left[:3])
        left += f" and {len(row.left) - 3} more" if len(row.left) > 3 else ""
        shares = f"{row.weights:.1%} | {row.macs:.1%} | {left} | {row.counted:.1%}"
        lines.append(f"| {row.model} | {row.package} | {row.parameters:,} | {shares} |")
    return "\n".join(lines) + "\n"


def _write(rows: Mapping[str, Row]) -> None:
    write_atomically(RESULTS / "coverage.json", json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n")
    head = (
        "# How much of published models is quantized\n\n"
        "Each model is unchanged, small, with random weights; W4A4, attention's products too, nothing left out. Shares "
        "are of the elements of all weights, embeddings and tables of positions included, and of the "
        "multiply-accumulates with both operands quantized. `torch counts` is what torch's FlopCounterMode counts in "
        "full precision, of ours; it does not count recurrent layers. Made by `python -m benchmarks.model_coverage`, "
        f"torch {version('torch')}.\n\n"
    )
    write_atomically(RESULTS / "coverage.md", head + table(rows))


def _read() -> dict[str, Row]:
    path = RESULTS / "coverage.json"
    content = json.loads(path.read_text()) if path.exists() else []
    return {row["model"]: Row(**{**row, "left": [tuple(part) for part in row["left"]]}) for row in content}


def main() -> int:
    """Measure models, and write the table; returns how many have a quantizer without a gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="models; all of them by default")
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - MODELS.keys()):
        parser.error(f"there is no model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    console, rows = Console(), _read()
    for name in options.models or MODELS:
        if importlib.util.find_spec(MODELS[name][0]) is None:
            console.print(f"{name} is skipped: pip install {MODELS[name][0]}.")
            continue
        rows[name] = cover(name)
        _write({known: rows[known] for known in MODELS if known in rows})
        console.print(rows[name], soft_wrap=True)
    return sum(bool(row.without_gradient) for row in rows.values())


if __name__ == "__main__":
    sys.exit(main())
