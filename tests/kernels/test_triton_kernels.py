"""The Triton kernels against functional: on a CUDA device where there is one, and in Triton's interpreter anywhere.

The interpreter wants to be asked for before Triton is imported, and for a whole process: one computes all cases, as
``python -m tests.kernels.test_triton_kernels FILE``, with the roughness of the device's own instructions.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cpq_lightning.functional.categorical import quantize_unchecked
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.kernels import cuda as gpu
from tests.grids import KINDS, zero_point

# One process of pytest's asks the interpreter.
pytestmark = pytest.mark.xdist_group("gpu")
ROOT = Path(__file__).parent.parent.parent

# Largest error of a gradient relative to the largest one, against functional in float64: both computations in float32
# start from a position and a width in scales that are rounded, which a narrow noise magnifies.
TOLERANCE = {1.0: 3e-6, 1 / 3: 1e-5, 0.1: 4e-5, 0.02: 6e-4}


@dataclass
class Case:
    x: torch.Tensor
    grad: torch.Tensor
    scale: torch.Tensor
    sigma: torch.Tensor
    bits: int = 4
    kind: str = "signed"
    estimator: str = "expectation"
    programs: int | None = None  # that a tensor is divided among at most

    @property
    def bounds(self):
        return level_bounds(self.bits, zero_point(self.kind, self.bits))


def draw(shape=(700,), scale=0.3, noise=1 / 3, spread=3.0, **settings):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = torch.full([1] * len(shape), scale)
    return Case(x * scale * spread, grad, scale, scale * noise, **settings)


def with_scales(case, scales, noise=1 / 3):
    scale = torch.tensor(scales).reshape(-1, *[1] * (case.x.dim() - 1))
    return replace(case, x=case.x * scale, scale=scale, sigma=scale * noise)


def grids():
    """More values than a program works on at a time, and no multiple of that."""
    for bits, kind, noise, estimator in itertools.product([1, 2, 4, 8], KINDS, TOLERANCE, ["argmax", "expectation"]):
        name = f"{bits} bits, {kind}, noise {noise:.2f}, {estimator}"
        yield name, draw(noise=noise, spread=2.0**bits / 2, bits=bits, kind=kind, estimator=estimator)
    for estimator in ("argmax", "expectation"):
        case = draw(estimator=estimator)
        far = 20 * case.scale * case.x.sign() * (torch.arange(700) % 2)
        yield f"far outside, {estimator}", replace(case, x=case.x + far)


def layouts():
    case = draw((4, 6, 5, 7))
    last = torch.channels_last
    for name, x in {
        "channels_last": case.x.to(memory_format=last),
        "transposed": case.x.transpose(1, 3),
        "strided": case.x[:, ::2],
        "expanded": case.x[:1].expand(4, 6, 5, 7),
        "0-d": case.x[0, 0, 0, 0],
        "one element": case.x[0, 0, 0, 3:4],
    }.items():
        flat = {"x": x, "scale": case.scale.reshape([1] * x.dim()), "sigma": case.sigma.reshape([1] * x.dim())}
        yield name, replace(case, grad=case.grad.flatten()[: x.numel()].reshape(x.shape), **flat)
        yield f"{name}, one gradient for all", replace(case, grad=torch.ones(()).expand(x.shape), **flat)
    scales = [0.1, 0.2, 0.3, 1e-3]
    by_rows = with_scales(draw((4, 6, 5, 7), scale=1.0), scales)
    yield "rows", by_rows
    yield "rows, argmax", replace(by_rows, estimator="argmax")
    yield "rows, channels_last", replace(by_rows, x=by_rows.x.to(memory_format=last))
    yield "rows, transposed", replace(by_rows, x=by_rows.x.transpose(1, 3).contiguous().transpose(1, 3))
    yield "rows of one", with_scales(draw((4, 1), scale=1.0), scales)
    yield "rows of many programs", with_scales(draw((4, 1300), scale=1.0), scales)
    yield "a few programs", draw((2, 7001), programs=3)
    yield "rows, a few programs", with_scales(draw((4, 3001), scale=1.0, programs=9), scales)


def halves():
    # The interpreter rounds bfloat16 in its own way: levels that are exact.
    for dtype, scale in ((torch.bfloat16, 0.25), (torch.float16, 0.3)):
        for estimator in ("argmax", "expectation"):
            case = draw(scale=scale, estimator=estimator)
            yield f"{dtype}, {estimator}", replace(case, x=case.x.to(dtype), grad=case.grad.to(dtype))
    case = draw(scale=0.25)
    a, s = case.scale.bfloat16(), case.sigma.bfloat16()
    yield "bfloat16 but for x", replace(case, scale=a, sigma=s)


def others():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0])
    for estimator in ("argmax", "expectation"):
        yield f"no numbers, {estimator}", replace(draw((6,), 0.5, 0.2, estimator=estimator), x=x)
    # Between levels and next to there, where a quotient off by its last bit is another level.
    scales = torch.rand(64, 1, generator=torch.Generator().manual_seed(2)) + 0.01
    x = (torch.arange(-140, 140) + 0.5) * scales
    x = torch.cat([x, x.nextafter(x * 2), x.nextafter(x * 0)], 1)
    yield "ties", Case(x, torch.ones_like(x), scales, scales / 3, bits=8)


GRIDS, LAYOUTS, HALVES, OTHERS = (dict(cases()) for cases in (grids, layouts, halves, others))


def compute(case, device):
    x, grad, scale, sigma = (t.to(device) for t in (case.x, case.grad, case.scale, case.sigma))
    before = gpu._PROGRAMS
    gpu._PROGRAMS = case.programs or before
    try:
        out = gpu.forward(x, scale, *case.bounds)
        settings = *case.bounds, case.estimator == "expectation"
        results = out, *gpu.backward(x, grad, scale, sigma, *settings)
        # As operators of torch's have it.
        assert len({t.untyped_storage().data_ptr() for t in (x, grad, scale, sigma, *results)}) == 8
        return tuple(t.cpu() for t in results)
    finally:
        gpu._PROGRAMS = before


def functional(case, dtype=None):
    x, scale, sigma = (t.to(dtype or t.dtype).requires_grad_() for t in (case.x.detach(), case.scale, case.sigma))
    settings = {
        "bits": case.bits,
        "min_bits": case.bits,
        "zero_point": zero_point(case.kind, case.bits),
        "estimator": case.estimator,
    }
    out = quantize_unchecked(x, scale, sigma, None, **settings)
    return out.detach(), *torch.autograd.grad(out, (x, scale, sigma), case.grad.to(out.dtype))


def errors(case, actual, true):
    """Of the three gradients: the largest relative to the largest of x's, or to what a sum is a sum of."""
    apart = tuple(range(case.scale.numel() > 1, case.x.dim()))
    of_sums = case.grad.float().abs().sum(apart).max() * max(1.0, 2.0**case.bits / 8)
    sizes = true[1].abs().max(), of_sums, of_sums
    return [float((a - b).abs().max() / size) for a, b, size in zip(actual[1:], true[1:], sizes, strict=True)]


@pytest.fixture(scope="module", params=["interpreter"] + ["cuda"] * torch.cuda.is_available())
def computed(request, tmp_path_factory):
    """What the kernels make of a case, given its name and itself."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        if (reason := gpu.unavailable()) is not None:
            pytest.skip(reason)
        return lambda name, case: compute(case, "cuda")
    file = tmp_path_factory.mktemp("gpu") / "computed.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_triton_kernels", str(file)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(file)

    def look_up(name, case):
        if isinstance(results[name], str):
            pytest.fail(results[name], pytrace=False)
        return results[name]

    return look_up


@pytest.mark.parametrize("name", GRIDS)
def test_values_to_the_bit_and_gradients_to_rounding(computed, name):
    case = GRIDS[name]
    noise = min(TOLERANCE, key=lambda noise: abs(noise - float(case.sigma / case.scale)))
    fused, plain, exact = computed(name, case), functional(case), functional(case, torch.float64)
    assert torch.equal(fused[0], plain[0])
    for of, actual, other in zip(
        ("x", "scale", "sigma"), errors(case, fused, exact), errors(case, plain, exact), strict=True
    ):
        assert actual < max(TOLERANCE[noise], 2 * other), of


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_in_memory_and_any_division_of_the_work(computed, name):
    case = LAYOUTS[name]
    fused, plain = computed(name, case), functional(case)
    assert torch.equal(fused[0], plain[0])
    assert [t.shape for t in fused] == [t.shape for t in plain]
    assert max(errors(case, fused, plain)) < 2 * TOLERANCE[1 / 3]
    if "expanded" not in name:
        assert fused[0].stride() == fused[1].stride()
    if name in ("channels_last", "transposed", "rows, channels_last"):
        assert fused[0].stride() == case.x.stride()


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_computed_in_float32(computed, name):
    case = HALVES[name]
    fused, plain = computed(name, case), functional(case)
    assert torch.equal(fused[0], plain[0])
    for actual, same in zip(fused[1:], plain[1:], strict=True):
        assert actual.dtype == same.dtype
        torch.testing.assert_close(actual, same, rtol=2 * torch.finfo(actual.dtype).eps, atol=2e-4)


@pytest.mark.parametrize("estimator", ["argmax", "expectation"])
def test_nan_stays_and_infinity_is_the_last_level(computed, estimator):
    name = f"no numbers, {estimator}"
    out, dx, *sums = computed(name, OTHERS[name])
    assert out[0].isnan()
    assert out[1:].tolist() == [3.5, -4.0, 3.5, -4.0, 0.0]
    assert dx[1:].isfinite().all()
    assert all(t.isnan() for t in sums)


def test_ties_go_where_functional_has_them_go(computed):
    case = OTHERS["ties"]
    out, _, d_scale, _ = computed("ties", case)
    assert torch.equal(out, functional(case)[0])
    torch.testing.assert_close(d_scale, functional(case)[2], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(2**33 + 5,), (3, 2**31 - 1)])
def test_elements_beyond_32_bits_are_counted(computed, shape):
    name = f"parts of {shape}"
    if name not in PARTS:
        pytest.skip("the interpreter only")
    end, length = 0, shape[-1]
    for row, first, count in computed(name, None).tolist():
        assert (first, row) == (end, end // length)
        assert 0 < count <= (row + 1) * length - first
        end += count
    assert end == math.prod(shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("estimator", ["argmax", "expectation"])
def test_a_graph_replays_what_launches_give_and_nothing_waits_for_the_device(estimator):
    case = draw((64, 1024), estimator=estimator)
    tensors = [t.cuda() for t in (case.x, case.grad, case.scale, case.sigma)]

    def launch():
        x, grad, scale, sigma = tensors
        return gpu.forward(x, scale, -8, 7), *gpu.backward(x, grad, scale, sigma, -8, 7, estimator == "expectation")

    launch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = launch(), launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch()
    graph.replay()
    for others in zip(second, captured, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, others, strict=True))


@pytest.mark.parametrize(("target", "dtype"), [(80, "bf16"), (90, "fp32"), (90, "fp16")])
def test_kernels_compile_for_cuda_without_a_device(target, dtype, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = {"x": dtype, "grad": dtype, "out": dtype, "dx": dtype, "scales": "fp32", "sigmas": "fp32", "sums": "fp32"}
    types = {name: f"*{kind}" for name, kind in tensors.items()} | {"low": "fp32", "high": "fp32"}
    kernels = gpu._kernels()
    for kernel, settings in (
        (kernels.forward, {}),
        (kernels.backward, {"EXPECTATION": False}),
        (kernels.backward, {"EXPECTATION": True}),
    ):
        constants = settings | {"TILE": 512}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in (*tensors, "length")}
        source = triton.compiler.ASTSource(
            kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
        )
        made = triton.compile(
            source, target=triton.backends.compiler.GPUTarget("cuda", target, 32), options={"num_warps": 4}
        )
        # Four elements to an access: what keeps memory busy.
        assert re.search(r"ld\.global\.v4\.b32" if dtype == "fp32" else r"ld\.global\.v2\.b32", made.asm["ptx"])
        assert "fma.rn.f32" in made.asm["ptx"]


@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        (torch.version, "hip", "6.4", "ROCm"),
        (torch.cuda, "is_available", lambda: False, "no CUDA device"),
        (sys.modules, "triton", None, "triton"),
    ],
)
def test_without_kernels_the_reason_is_in_words(module, name, value, words, monkeypatch):
    gpu._tried.cache_clear()
    if module is sys.modules:
        gpu._kernels.cache_clear()
        monkeypatch.delitem(module, "cpq_lightning.kernels.triton_kernels", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setitem(module, name, value)
    else:
        monkeypatch.setattr(module, name, value)
    assert words in gpu.unavailable()
    gpu._tried.cache_clear()


def test_nothing_is_compiled_during_a_capture(monkeypatch):
    gpu._tried.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "graph" in gpu.unavailable()
    assert not gpu._tried.cache_info().currsize


if TYPE_CHECKING:
    import triton.language as tl

    from cpq_lightning.kernels.triton_kernels import _part


def parts(out, length, programs, tiles, TILE):
    row, first, count = _part(length, programs, tiles, TILE)
    out += 3 * tl.program_id(0)
    tl.store(out, row)
    tl.store(out + 1, first)
    tl.store(out + 2, count)


def compute_parts(shape):
    import triton

    globals().update(tl=triton.language, _part=gpu._kernels()._part)
    scales = torch.empty(shape[0] if len(shape) > 1 else 1, device="meta")
    before, gpu._PROGRAMS = gpu._PROGRAMS, 50
    launch, options = gpu._division(torch.empty(shape, device="meta"), scales)
    gpu._PROGRAMS = before
    out = torch.zeros(launch[0], 3, dtype=torch.int64)
    triton.jit(parts)[launch](out, **options)
    return out


def device_arithmetic():
    """Make instructions as rough as the device's, exp2 to 2^-22.5, reciprocals and quotients to an ulp or two."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    generator = np.random.default_rng(0)

    def rough(values, error):
        values = values * (1 + error * generator.uniform(-1, 1, values.shape))
        return TensorHandle(np.where(np.abs(values) < 2.0**-126, 0, values).astype(np.float32), tl.float32)

    def wide(handle):
        return np.asarray(handle.data, np.float64)

    def asm(text, constraints, operands, *_):
        assert text == "rcp.approx.ftz.f32 $0, $1;"
        result = rough(1 / wide(operands[0]), 2**-23)
        return type("Results", (), {"get_result": lambda self, index: result})()

    builder = interpreter_builder
    builder.create_inline_asm = asm
    builder.create_exp2 = lambda x: rough(np.exp2(wide(x)), np.where(wide(x) == 0, 0, 2**-22.5))
    builder.create_fdiv = lambda x, y: rough(wide(x) / wide(y), 2**-22)
    # In float64 a product of two float32 is exact.
    builder.create_fma = lambda x, y, z: TensorHandle((wide(x) * wide(y) + wide(z)).astype(np.float32), tl.float32)


PARTS = {f"parts of {shape}": shape for shape in ((2**33 + 5,), (3, 2**31 - 1))}


def main(file):
    results = {}
    torch.set_num_threads(1)
    for name, shape in PARTS.items():
        results[name] = compute_parts(shape)
    device_arithmetic()
    for name, case in (GRIDS | LAYOUTS | HALVES | OTHERS).items():
        try:
            results[name] = compute(case, "cpu")
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
