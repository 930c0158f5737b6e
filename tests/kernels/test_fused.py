"""The compiled kernels against functional, and what happens where there are none."""

import importlib.util
import itertools
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.processes import run_processes
from cpq_lightning.functional.categorical import quantize_unchecked
from cpq_lightning.kernels import cpu_build as library_module
from cpq_lightning.kernels.cpu_build import _library, library, use_kernels
from cpq_lightning.kernels.dispatch import describe
from cpq_lightning.kernels.fused import quantize
from tests.grids import KINDS, zero_point

pytestmark = pytest.mark.skipif(library() is None, reason=describe())

# Largest error of a gradient relative to the largest one, against functional in float64: both computations in float32
# start from a position and a width in scales that are rounded, which a narrow noise magnifies.
TOLERANCE = {1.0: 3e-6, 1 / 3: 1e-5, 0.1: 4e-5, 0.02: 6e-4}


def gradients(compute, x, scale, sigma, grad, **settings):
    x, scale, sigma = (t.detach().clone().requires_grad_() for t in (x, scale, sigma))
    settings = {"bits": 4, "zero_point": 8, "estimator": "expectation"} | settings
    out = compute(x, scale, sigma, None, min_bits=settings["bits"], **settings)
    out.backward(grad.to(out.dtype))
    return out.detach(), x.grad, scale.grad, sigma.grad


def draw(shape=(4099,), scale=0.3, noise=1 / 3, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = torch.full((1,), scale)
    return x * scale * spread, scale, scale * noise, grad


@pytest.mark.parametrize("estimator", ["argmax", "expectation"])
@pytest.mark.parametrize("noise", TOLERANCE)
@pytest.mark.parametrize(("bits", "kind"), itertools.product([1, 2, 4, 8], KINDS))
def test_values_to_the_bit_and_gradients_to_rounding(bits, kind, noise, estimator):
    tensors = draw(noise=noise, spread=2.0**bits / 2)
    settings = {"bits": bits, "zero_point": zero_point(kind, bits), "estimator": estimator}
    fused = gradients(quantize, *tensors, **settings)
    plain = gradients(quantize_unchecked, *tensors, **settings)
    exact = gradients(quantize_unchecked, *(t.double() for t in tensors), **settings)
    assert torch.equal(fused[0], plain[0])
    for name, actual, same, true in zip(("x", "scale", "sigma"), fused[1:], plain[1:], exact[1:], strict=True):
        # A sum may cancel to nearly nothing: what it is a sum of sets the scale.
        size = true.abs().max() if name == "x" else (tensors[3].abs().sum() * max(1.0, 2.0**bits / 8)).double()
        error, other = (float((t - true).abs().max() / size) for t in (actual, same))
        assert error < max(TOLERANCE[noise], 2 * other), name


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 1100), (6, 2**14)])
def test_each_channel_has_its_scale(shape):
    x, _, _, grad = draw(shape)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 1e-3]).reshape(6, *[1] * (len(shape) - 1))
    # From where the noise is read off a table of one, of two vectors, or of none.
    sigma = scale * torch.tensor([0.5, 1 / 3, 0.1, 0.05, 0.02, 1.0]).reshape(scale.shape)
    fused = gradients(quantize, x, scale, sigma, grad)
    plain = gradients(quantize_unchecked, x, scale, sigma, grad)
    exact = gradients(quantize_unchecked, *(t.double() for t in (x, scale, sigma, grad)))
    assert torch.equal(fused[0], plain[0])
    for actual, same, true in zip(fused[1:], plain[1:], exact[1:], strict=True):
        assert actual.shape == same.shape
        error, other = (float((t - true).abs().max()) for t in (actual, same))
        assert error <= 2 * other + 2e-5 * float(true.abs().max())


@pytest.mark.parametrize("estimator", ["argmax", "expectation"])
@pytest.mark.parametrize("shape", [(3001,), (6, 1100), (6, 5, 3, 3)])
def test_bfloat16_is_rounded_once(shape, estimator):
    x, _, _, grad = draw(shape)
    x, grad = x.bfloat16(), grad.bfloat16()
    scale = torch.full((6 if len(shape) > 1 else 1, *[1] * (len(shape) - 1)), 0.3)
    fused = gradients(quantize, x, scale, scale / 3, grad, estimator=estimator)
    plain = gradients(quantize_unchecked, x, scale, scale / 3, grad, estimator=estimator)
    assert fused[0].dtype == fused[1].dtype == torch.bfloat16
    assert torch.equal(fused[0], plain[0])
    # One unit in the last place of a half, where rounding to the other side begins.
    torch.testing.assert_close(fused[1], plain[1], rtol=2**-7, atol=1e-5)
    for actual, same in zip(fused[2:], plain[2:], strict=True):
        torch.testing.assert_close(actual, same, rtol=1e-4, atol=1e-3)


def test_nan_in_a_long_row_stays_where_it_is():
    x, scale, sigma, grad = draw((4096,))
    x[7] = float("nan")
    _, dx, *_ = gradients(quantize, x, scale, sigma, grad)
    assert dx.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded", "0-d"])
def test_any_layout_in_memory(layout):
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(1))
    x = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(1, 3),
        "strided": lambda: x[:, ::2],
        "expanded": lambda: x[:1].expand(4, 6, 5, 7),
        "0-d": lambda: x[0, 0, 0, 0],
    }[layout]()
    grad = torch.randn_like(x)
    scale = torch.full([1] * x.dim(), 0.3)
    for g in (grad, grad.contiguous(), torch.ones(()).expand(x.shape)):
        results = []
        for compute in (quantize, quantize_unchecked):
            leaf, a = x.detach().requires_grad_(), scale.clone().requires_grad_()
            out = compute(leaf, a, a / 3, None, bits=4, min_bits=4, zero_point=8, estimator="expectation")
            results.append((out, *torch.autograd.grad(out, (leaf, a), g)))
        for actual, same in zip(*results, strict=True):
            assert actual.shape == same.shape
            torch.testing.assert_close(actual, same, rtol=2e-5, atol=2e-5)
        assert torch.equal(results[0][0], results[1][0])
    if layout != "expanded":
        assert results[0][0].stride() == torch.empty_like(x).stride()


def test_nan_stays_and_infinity_is_the_last_level():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0])
    out, dx, *_ = gradients(quantize, x, torch.tensor([0.5]), torch.tensor([0.1]), torch.ones(6))
    assert out[0].isnan()
    assert out[1:].tolist() == [3.5, -4.0, 3.5, -4.0, 0.0]
    assert dx[1:].isfinite().all()


def test_sums_do_not_depend_on_the_number_of_threads():
    tensors = draw((300_001,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(quantize, *tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_kernels_do_not_compute_is_functional_s():
    x, scale, sigma, grad = draw((64,))
    masks = torch.tensor([[1.0], [0.5]])
    cases = [
        (x.double(), scale.double(), sigma.double(), None),
        (x.half(), scale, sigma, None),
        (x, scale, sigma, masks),
        (x[:0], scale, sigma, None),
    ]
    for *tensors, mask in cases:
        settings = {"bits": 4, "min_bits": 4 if mask is None else 3, "zero_point": 8, "estimator": "argmax"}
        actual, same = (compute(*tensors, mask, **settings) for compute in (quantize, quantize_unchecked))
        assert torch.equal(actual, same)
    with use_kernels(False):
        assert library() is None
        off = gradients(quantize, x, scale, sigma, grad)
    assert all(
        torch.equal(a, b) for a, b in zip(off, gradients(quantize_unchecked, x, scale, sigma, grad), strict=True)
    )


def test_open_masks_that_nobody_learns_are_none():
    x, scale, sigma, grad = draw()
    x, scale, sigma = (t.requires_grad_() for t in (x, scale, sigma))
    settings = {"bits": 4, "zero_point": 8, "estimator": "expectation"}
    results = []
    for masks, narrowest in ((None, 4), (torch.ones(3, 1), 2)):
        out = quantize(x, scale, sigma, masks, min_bits=narrowest, **settings)
        results.append((out, *torch.autograd.grad(out, (x, scale, sigma), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_a_compiler_functional_computes_and_says_why():
    (done,) = run_processes(describe_and_quantize, environments=[{"CC": "/nowhere/cc", "PATH": "/nowhere"}])
    assert "no C compiler" in done.stdout
    assert "levels: True" in done.stdout


def test_kernels_are_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("CPQ_KERNELS", "off")
    spec = importlib.util.spec_from_file_location("imported_again", library_module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.library() is None
    assert "switched off" in again.describe()


def describe_and_quantize():
    """For processes whose environment is another one, once this module is imported."""
    library_module._library.cache_clear()
    print(describe())
    x = torch.randn(200_000)
    out = quantize(
        x, torch.tensor([0.25]), torch.tensor([0.08]), None, bits=3, min_bits=3, zero_point=4, estimator="argmax"
    )
    print("levels:", torch.equal(out, (x / 0.25).round().clamp(-4, 3) * 0.25))


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo broken 1.0 && exit 0\necho 'no such thing' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reason = library_module._library.__wrapped__()
    assert isinstance(reason, str)
    assert "no such thing" in reason
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert _library() is library()


@pytest.fixture
def loaded_from(monkeypatch, tmp_path):
    """Load the kernels in a cache of the test's; returns the library, as a new process would find it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(counting_compiler(tmp_path)))

    def load():
        loaded = _library.__wrapped__()
        assert not isinstance(loaded, str), loaded
        monkeypatch.setattr(library_module, "_library", lambda: loaded)
        return loaded

    return load


def counting_compiler(folder):
    """A compiler that notes what it links, and optimizes nothing, which takes most of the time."""
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -shared ] && echo linked >> {folder}/log\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler


def builds(tmp_path):
    return len((tmp_path / "log").read_text().split())


def is_alone(loaded, *words):
    """Whether it was built for this process, nothing of it is left behind, and the doctor's line says why."""
    path = Path(loaded._name)
    assert path.parent.parent == Path(tempfile.gettempdir())
    assert not path.parent.exists()
    line = library_module.describe()
    assert "compiled kernels, built for this process alone (" in line
    assert all(str(word) in line for word in words), line
    x, scale, sigma = (torch.tensor([value]) for value in (0.26, 0.25, 0.08))
    with use_kernels(True):
        out = quantize(x, scale, sigma, None, bits=3, min_bits=3, zero_point=4, estimator="argmax")
    return out.item() == 0.25


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_a_cache_of_the_user_is_built_once_and_used(loaded_from, tmp_path, umask):
    before = os.umask(umask)
    try:
        names = {loaded_from()._name for _ in range(2)}
    finally:
        os.umask(before)
    (path,) = (tmp_path / "cpq_lightning").iterdir()
    assert names == {str(path)}
    assert builds(tmp_path) == 1
    assert "compiled kernels, /" in library_module.describe()
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("mode", [0o770, 0o702])
@pytest.mark.parametrize("linked", [False, True])
def test_a_cache_that_others_may_write_to_is_not_used(loaded_from, tmp_path, mode, linked):
    loaded_from()
    folder = tmp_path / "cpq_lightning"
    if linked:
        folder = folder.rename(tmp_path / "elsewhere")
        (tmp_path / "cpq_lightning").symlink_to(folder)
    folder.chmod(mode)
    assert is_alone(loaded_from(), f"others may write to {folder}: chmod go-w")
    assert builds(tmp_path) == 2


def test_a_library_that_others_may_write_to_is_not_loaded(loaded_from, tmp_path):
    path = Path(loaded_from()._name)
    path.chmod(0o720)
    # Loading what is in it would fail.
    path.write_bytes(b"of somebody else")
    assert is_alone(loaded_from(), f"others may write to {path}")


def test_a_library_that_is_a_link_is_not_loaded(loaded_from, tmp_path):
    path = Path(loaded_from()._name)
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    assert is_alone(loaded_from(), f"{path} was not created by this package")


@pytest.mark.parametrize("what", ["cpq_lightning", "quantize"])
def test_what_belongs_to_somebody_else_is_not_used(loaded_from, monkeypatch, what):
    path = Path(loaded_from()._name)
    foreign = path if what == "quantize" else path.parent
    lstat = os.lstat

    def of_somebody_else(asked, **settings):
        status = lstat(asked, **settings)
        if Path(asked) != foreign:
            return status
        values = list(status)
        values[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(values)

    monkeypatch.setattr(library_module.os, "lstat", of_somebody_else)
    assert is_alone(loaded_from(), f"{foreign} belongs to user {os.geteuid() + 1}, not to user {os.geteuid()}")


def test_a_user_who_runs_as_another_does_not_use_the_others_cache(loaded_from, monkeypatch, tmp_path):
    loaded_from()
    monkeypatch.setattr(library_module.os, "geteuid", lambda: 12345)
    assert is_alone(loaded_from(), tmp_path / "cpq_lightning", "not to user 12345 who runs this")


@pytest.mark.parametrize(("mode", "used"), [(0o777, False), (0o1777, True), (0o775, True)])
def test_a_cache_is_not_used_where_everybody_may_put_another_in_its_place(loaded_from, tmp_path, mode, used):
    tmp_path.chmod(mode)
    loaded = loaded_from()
    assert bool(loaded.alone) != used
    assert used or is_alone(loaded, "others may replace")


def test_without_users_as_on_windows_nothing_is_kept(loaded_from, monkeypatch, tmp_path):
    monkeypatch.delattr(library_module.os, "geteuid")
    assert is_alone(loaded_from(), "it is not known whether others may write to")
    assert not list((tmp_path / "cpq_lightning").iterdir())


def no_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(library_module.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))


def absent_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")


def file_in_the_way(monkeypatch, tmp_path):
    (tmp_path / "cpq_lightning").touch()


def read_only(monkeypatch, tmp_path):
    mkdtemp = tempfile.mkdtemp

    def refusing(suffix=None, prefix=None, dir=None):
        if dir is not None:
            raise OSError(30, "Read-only file system", str(dir))
        return mkdtemp(suffix, prefix, dir)

    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(tempfile, "mkdtemp", refusing)


@pytest.mark.parametrize(
    ("hinder", "words"),
    [
        (no_home, "the cache cannot be made: no home directory"),
        (absent_home, "the cache cannot be made"),
        (file_in_the_way, "the cache cannot be made"),
        (read_only, "the cache cannot be written"),
    ],
)
def test_without_a_cache_kernels_are_built_for_the_process(loaded_from, monkeypatch, tmp_path, caplog, hinder, words):
    hinder(monkeypatch, tmp_path)
    with caplog.at_level("INFO", "cpq_lightning"):
        loaded = loaded_from()
    assert is_alone(loaded, words)
    assert any(words in text for text in caplog.messages)


def test_where_neither_the_cache_nor_a_folder_for_the_process_will_do_both_reasons_are_given(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    # As in a folder for temporary files that is mounted noexec.
    monkeypatch.setattr(library_module, "_build", lambda folder, *settings: folder / "nothing.so")
    reason = library_module._library.__wrapped__()
    assert isinstance(reason, str)
    assert "nothing.so" in reason
    assert "the cache cannot be made" in reason


def test_two_processes_that_build_at_once_both_have_it(tmp_path):
    both = run_processes(describe_and_quantize, environments=[{"XDG_CACHE_HOME": str(tmp_path)}] * 2)
    assert all("compiled kernels" in done.stdout and "levels: True" in done.stdout for done in both)
    assert [path.suffix for path in (tmp_path / "cpq_lightning").iterdir()] == [".so"]


def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path):
    compiler = tmp_path / "cc"
    script = ["#!/bin/sh", 'case " $* " in *" -fopenmp "*) echo no openmp >&2; exit 1;; esac', 'exec gcc "$@"']
    compiler.write_text("\n".join(script))
    compiler.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CC": str(compiler)}
    (done,) = run_processes(describe_and_quantize, environments=[environment])
    assert "compiled kernels" in done.stdout
    assert "levels: True" in done.stdout
