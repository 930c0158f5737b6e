"""Hypothesis strategies that the property-based tests share.

A case is a frozen record of plain settings and a seed, and its tensors are computed from them: a counterexample prints
as one line that can be pasted back into a test, and drawing thousands of values one by one would take minutes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cpq_lightning import CPQConfig
from cpq_lightning.functional.dropbits import masks_from_gates
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.nn.quantizer import Kind, Quantizer
from tests.grids import KINDS, zero_point

# Derandomized: a run finds what any other run of the same code finds.
REPRODUCIBLE = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)

ESTIMATORS = ("argmax", "expectation")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "permuted", "strided", "expanded")
DENSE_LAYOUTS = ("contiguous", "channels_last", "permuted")
GATES = ("between", "binary", "open", "shut")
VALUES = ("spread", "halves", "far")
# Powers of two that the scale is drawn around: values of 8 bits, 64 scales beyond them, have room in the dtype.
SCALE_EXPONENTS = {torch.float64: 100, torch.float32: 30, torch.bfloat16: 30, torch.float16: 5}


def examples(count: int) -> settings:
    """Settings of a property: so many examples, the same ones in every run."""
    return settings(REPRODUCIBLE, max_examples=count)


def shapes(least: int = 0, most: int = 5, empty: bool = True) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes; about one dimension in twelve is empty."""
    sizes = st.sampled_from((1, 2, 3, 4, 2, 3, 1, 4, 2, 3, 5) + ((0,) if empty else ()))
    # Any number of dimensions as often as any other: lists are mostly short.
    return st.integers(least, most).flatmap(lambda n: st.tuples(*[sizes] * n))


@st.composite
def broadcasting(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shapes that broadcast to one: some dimensions 1, leading ones left out."""
    kind = draw(st.sampled_from(("scalar", "channel", "any", "element")))
    if kind == "element":
        return shape
    kept = [False] * len(shape)
    if kind == "channel" and shape:
        kept[draw(st.integers(0, len(shape) - 1))] = True
    elif kind == "any":
        kept = [draw(st.booleans()) for _ in shape]
    sizes = [size if keep else 1 for size, keep in zip(shape, kept, strict=True)]
    leading = next((i for i, size in enumerate(sizes) if size != 1), len(sizes))
    return tuple(sizes[draw(st.integers(0, leading)) :])


def lay_out(t: torch.Tensor, how: str, dim: int, first: int = 0) -> torch.Tensor:
    """The same values elsewhere in memory; ``"expanded"`` repeats the first ones along a dimension from ``first`` on.

    Garbage lies between the elements of a strided slice: whoever reads past one finds NaN.
    """
    n = t.dim()
    if n <= first or how == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    dim = first + dim % (n - first)
    if how == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return t.contiguous(memory_format=formats[n]) if n in formats else t.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "permuted":
        order = [(i + dim + 1) % n for i in range(n)]
        return t.permute(order).contiguous().permute([order.index(i) for i in range(n)])
    if how == "strided":
        room = t.new_full([2 * size + 1 if i == dim else size for i, size in enumerate(t.shape)], math.nan)
        view = room[(*[slice(None)] * dim, slice(1, None, 2))]
        return view.copy_(t)
    return t.narrow(dim, 0, min(1, t.shape[dim])).clone().expand_as(t)


def layout(t: torch.Tensor) -> list[int]:
    """Strides of a tensor that has elements, as far as they mean anything: a dimension of size 1 can have any."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []


def contiguous(tensors):
    """Copies in the standard layout."""
    return [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in tensors]


@dataclass(frozen=True)
class Case:
    """One call of ``quantize`` or ``quantize_resolution``."""

    shape: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    # Of scale, sigma and masks, which in a quantizer stay float32 whatever x is.
    parameter_dtype: torch.dtype = torch.float32
    bits: int = 1
    min_bits: int = 1
    kind: str = "signed"
    estimator: str = "argmax"
    scale_shape: tuple[int, ...] = ()
    sigma_shape: tuple[int, ...] = ()
    mask_shape: tuple[int, ...] | None = None
    gates: str = "open"
    values: str = "spread"
    # How narrow noise may be, in scales.
    noise: float = 1 / 3
    exponent: int = 0
    layout: str = "contiguous"
    dim: int = 0
    seed: int = 0

    @property
    def grid(self) -> dict[str, Any]:
        """The keyword arguments."""
        return {
            "bits": self.bits,
            "min_bits": self.min_bits,
            "zero_point": zero_point(self.kind, self.bits),
            "estimator": self.estimator,
        }

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, scale, sigma and masks, laid out."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(*shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        # Exact halves of a scale need a scale that the dtype holds with digits to spare.
        spread = 0 if self.values == "halves" else 1
        scale = torch.exp2(self.exponent + spread * uniform(*self.scale_shape)).to(self.parameter_dtype)
        noise = self.noise
        if self.dtype == torch.float64 and self.mask_shape is not None:
            # A closed ring's mask has derivatives up to exp(distance / sigma), which float64 does not hold at exp(40).
            noise = max(noise, (64 + 2**self.bits) / 600)
        # A sigma has the smallest scale of those that it broadcasts over.
        smallest = scale.double().min() if scale.numel() else torch.ones(())
        sigma = smallest * (noise + (1 - noise) * uniform(*self.sigma_shape))
        sigma = sigma.to(self.parameter_dtype).clamp(max=smallest.to(self.parameter_dtype))
        low, high = level_bounds(self.bits, zero_point(self.kind, self.bits))
        u = 1.5 * (low + uniform(*self.shape) * (high - low)) - 0.7
        if self.values == "halves":
            u = (2 * u).round() / 2
        elif self.values == "far":
            # Out to where float32 no longer tells one level from the next; float16 ends at 65504.
            least, most = (-15, 5) if self.dtype == torch.float16 else (-10, 48)
            u = torch.exp2(least + uniform(*self.shape) * (most - least)) * u
        x = (u * scale.double()).to(self.dtype)
        masks = None
        if self.mask_shape is not None:
            gates = uniform(self.bits - self.min_bits, *self.mask_shape)
            gates = {
                "between": torch.where(gates < 0.3, 0.0, (gates * 1.2).clamp(max=1)),
                "binary": (gates < 0.7).double(),
                "open": torch.ones_like(gates),
                "shut": torch.zeros_like(gates),
            }[self.gates]
            masks = lay_out(masks_from_gates(gates).to(self.parameter_dtype), self.layout, self.dim, first=1)
        return (
            lay_out(x, self.layout, self.dim),
            lay_out(scale, self.layout, self.dim),
            lay_out(sigma, self.layout, self.dim),
            masks,
        )

    def upstream(self) -> torch.Tensor:
        """A gradient of the output, as a loss may hand it back, in the layout of the case."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return lay_out(torch.randn(self.shape, generator=generator).to(self.dtype), self.layout, self.dim)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    layouts: tuple[str, ...] = LAYOUTS,
    gates: tuple[str, ...] = GATES,
    values: tuple[str, ...] = VALUES,
    masks: bool | None = None,
    noise: tuple[float, ...] = (1 / 3, 1.0, 0.1, 0.02),
    bits: int = 8,
    empty: bool = True,
) -> Case:
    """Cases; ``masks`` says whether there are any, ``None`` that it is drawn."""
    shape = draw(shapes(empty=empty))
    dtype = draw(st.sampled_from(dtypes))
    # Gradients of scale and sigma grow with the square of the levels over the noise, beyond what float16 has.
    parameter_dtypes = (torch.float32,) if dtype == torch.float16 else (dtype, torch.float32)
    width = draw(st.integers(1, bits))
    masked = draw(st.booleans()) if masks is None else masks
    reach = SCALE_EXPONENTS[dtype]
    return Case(
        shape=shape,
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from(parameter_dtypes)) if dtype != torch.float64 else dtype,
        bits=width,
        min_bits=draw(st.integers(1, width)),
        kind=draw(st.sampled_from(KINDS)),
        estimator=draw(st.sampled_from(ESTIMATORS)),
        scale_shape=draw(broadcasting(shape)),
        sigma_shape=draw(broadcasting(shape)),
        mask_shape=draw(broadcasting(shape)) if masked else None,
        gates=draw(st.sampled_from(gates)) if masked else "open",
        values=draw(st.sampled_from(values)),
        noise=draw(st.sampled_from(noise)),
        exponent=draw(st.integers(-reach, min(reach, 0) if dtype == torch.float16 else reach)),
        layout=draw(st.sampled_from(layouts)),
        dim=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def settings_of_layers(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a ``CPQConfig``."""
    bits, act_bits = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return {
        "weight_bits": bits,
        "min_bits": draw(st.one_of(st.none(), st.integers(1, bits))),
        "learn_bits": draw(st.booleans()),
        "act_bits": act_bits,
        "min_act_bits": draw(st.one_of(st.none(), st.integers(1, act_bits))),
        "learn_act_bits": draw(st.booleans()),
        "nesting": draw(st.sampled_from(("auto", "range", "resolution"))),
        "weight_estimator": draw(st.sampled_from(ESTIMATORS)),
        "act_estimator": draw(st.sampled_from(ESTIMATORS)),
        "per_channel": draw(st.booleans()),
        "temperature": draw(st.sampled_from((1.0, 0.1))),
        "keep_prob": draw(st.sampled_from((1.0, 0.5))),
        "gate_sharing": draw(st.sampled_from(("tensor", "channel", "element"))),
        "weight_range": draw(st.sampled_from(("mse", "max"))),
        "act_range": draw(st.sampled_from(("mse", "max"))),
    }


@dataclass(frozen=True)
class QuantizerCase:
    """A quantizer and what it quantizes."""

    kind: Kind = "weight"
    shape: tuple[int, ...] = (1, 1)
    channel_dim: int = 0
    dtype: torch.dtype = torch.float32
    exponent: int = 0
    # Of a weight the first channel is dead, of an activation no value is negative.
    half: bool = False
    layout: str = "contiguous"
    dim: int = 0
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def x(self) -> torch.Tensor:
        """A weight or an activation."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) * 2.0**self.exponent
        if self.half and self.kind == "activation":
            x = x.relu()
        elif self.half:
            x.narrow(self.channel_dim, 0, min(1, self.shape[self.channel_dim])).zero_()
        return lay_out(x.to(self.dtype), self.layout, self.dim)

    def fresh(self) -> Quantizer:
        """A quantizer that has seen nothing yet."""
        channels = self.shape[self.channel_dim] if self.kind == "weight" else 1
        numel = math.prod(self.shape) if self.kind == "weight" else 0
        config = CPQConfig(**self.settings)
        return Quantizer(self.kind, config, key=3, numel=numel, channels=channels, channel_dim=self.channel_dim)

    def trained(self) -> Quantizer:
        """A quantizer as some steps of training leave it."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        quantizer = self.fresh()
        quantizer(self.x())
        with torch.no_grad():
            for p, reach in ((quantizer.log_scale, 0.3), (quantizer.noise_logit, 1.0), (quantizer.gates.logit, 2.0)):
                if p is not None:
                    p += reach * torch.randn(p.shape, generator=generator)
            if quantizer.has_gates:
                quantizer.noise_step.fill_(self.seed)
        return quantizer

    def upstream(self) -> torch.Tensor:
        """A gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.shape, generator=generator).to(self.dtype)


@st.composite
def quantizer_cases(draw: st.DrawFn, layouts: tuple[str, ...] = LAYOUTS, empty: bool = False) -> QuantizerCase:
    """Quantizers of any settings on any input; ``empty`` says whether an activation may be, a weight never is."""
    kind = draw(st.sampled_from(("weight", "activation")))
    # What is quantized as a weight multiplies: it has at least two dimensions.
    shape = draw(shapes(least=2, empty=False) if kind == "weight" else shapes(empty=empty))
    dtype = draw(st.sampled_from(DTYPES))
    # What is quantized may end up a scale further out: float16 needs room for it.
    reach = 6 if dtype == torch.float16 else 40
    return QuantizerCase(
        kind=kind,
        shape=shape,
        channel_dim=draw(st.integers(0, 1)) if kind == "weight" else 0,
        dtype=dtype,
        exponent=draw(st.integers(-reach, reach)),
        half=draw(st.booleans()),
        layout=draw(st.sampled_from(layouts)),
        dim=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 2**16)),
        settings=draw(settings_of_layers()),
    )
