"""What the benchmark of a training step measures can be built, and its table rendered; nothing here is about time."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.train_step import results, table
from benchmarks.train_step import variants as v
from benchmarks.train_step.__main__ import main
from benchmarks.train_step.measure import Setting, Step, measure
from benchmarks.train_step.peers import BruteForce
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.model_cost import mean_width
from cpq_lightning.functional.categorical import quantize

# What its tests share takes seconds to make.
pytestmark = pytest.mark.xdist_group("benchmarks")

TINY = Setting("test_resnet", size=32, batch=2, threads=1)
TINY_VIT = dataclasses.replace(TINY, model="test_vit")
# What each kind of surgery does to linear layers.
ON_VIT = [v.TORCH, v.EXPECTATION, v.BREVITAS, v.NNCF]


def _options(only=None, **settings):
    return SimpleNamespace(
        **({"only": only, "compile": False, "functional": False, "brute_force": False, "attention": False} | settings)
    )


def _buildable():
    for name, variant in v.VARIANTS.items():
        mark = pytest.mark.skipif(bool(variant.missing), reason=variant.missing)
        for setting in (TINY, TINY_VIT) if name in ON_VIT else (TINY,):
            yield pytest.param(name, setting, id=f"{setting.model}-{name}", marks=mark)


@pytest.fixture(scope="module")
def measured():
    wanted, variants = v.selected(_options([v.FULL, v.TORCH, v.EXPECTATION, v.FROZEN, v.BRUTE]), print)
    return measure(wanted, variants, TINY, rounds=2, peaks=False)


@pytest.mark.parametrize(("name", "setting"), list(_buildable()))
def test_variant_takes_a_step(name, setting):
    step = Step(v.VARIANTS[name], setting)
    before = [p.detach().clone() for p in step.model.parameters()]
    step()
    after = list(step.model.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not p.equal(q) for p, q in zip(before, after, strict=True))


def test_frozen_widths_are_at_the_target():
    model = Step(v.VARIANTS[v.FROZEN], TINY).model
    assert abs(mean_width(model, "weight") - 4) < 0.2
    assert not any(q.has_gates for _, q in quantizers(model))


@pytest.mark.parametrize("signed", [True, False])
def test_brute_force_is_the_same_quantizer(signed):
    x = torch.linspace(-3, 4, 101, dtype=torch.float64, requires_grad=True)
    brute = BruteForce(4, signed).double()
    brute(x)
    own = quantize(x, brute.step, brute.sigma, bits=4, zero_point=None if signed else 0, estimator="expectation")
    assert torch.equal(brute(x), own)
    weight, inputs = torch.rand_like(x), [x, brute.log_scale, brute.sigma]
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (brute(x), own)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Changing(torch.nn.Module):
    """Breaks the graph once, and is another function in each step."""

    def __init__(self, network):
        super().__init__()
        self.network, self.times = network, 0

    def forward(self, images):
        self.times += 1
        torch._dynamo.graph_break()
        return self.network(images) * self.times


def test_breaks_and_recompilations_are_counted():
    changing = v.Variant(lambda network, images: Changing(network), against=(v.FULL,))
    # Without code generation, which takes a minute.
    setting = dataclasses.replace(TINY, backend="eager")
    variants = {v.FULL: v.VARIANTS[v.FULL], "changing": changing}
    figures = measure(variants, variants, setting, rounds=2)
    assert (figures[v.FULL]["graph_breaks"], figures[v.FULL]["recompilations"]) == (0, 0)
    assert figures["changing"]["graph_breaks"] >= 1
    assert figures["changing"]["recompilations"] >= 1
    assert figures["changing"]["first_step_seconds"] > 0


def test_compile_measures_what_compiles():
    wanted, variants = v.selected(_options(compile=True), print)
    assert set(wanted) == set(variants) == {v.FULL, v.EXPECTATION, v.ARGMAX}
    with pytest.raises(ValueError, match="--compile measures"):
        v.selected(_options(only=[v.TORCH], compile=True), print)


def test_figures_are_merged_and_the_table_renders(measured, tmp_path):
    path = tmp_path / "results" / "figures.json"
    path.parent.mkdir()
    results.save(measured, TINY, ["--model", TINY.model], path)
    rows = [dataclasses.replace(r, setting=TINY) for r in table.ROWS if r.kind in ("seconds", "kept_bytes")]
    rows = [r for r in rows if r.variant in measured and r.partner in measured]
    text = table.markdown(results.load(path), rows)
    assert "not measured" not in text
    assert text.count("\n| ") >= len(rows)
    assert "1. `python -m benchmarks.train_step --model test_resnet`" in text
    assert table.terminal(measured, TINY).row_count >= len(measured)
    # A later run of one variant replaces that one's figures alone.
    known = results.load(path)
    known["runs"] = {"2026-01-01": known["runs"].popitem()[1] | {"time": "2026-01-01"}}
    for figure in known["figures"][TINY.name].values():
        figure["run"] = "2026-01-01"
    path.write_text(json.dumps(known))
    results.save({v.TORCH: measured[v.TORCH]}, TINY, [], path)
    later = results.load(path)
    assert len(later["runs"]) == 2
    assert {n for n, f in later["figures"][TINY.name].items() if f["run"] != "2026-01-01"} == {v.TORCH}
    assert str(path.home()) not in path.read_text()


def test_the_command_prints_the_table(capsys):
    main(["--table"])
    assert capsys.readouterr().out.startswith("| figure | measured | target |")


def test_a_missing_peer_is_named():
    absent = {v.FULL: v.VARIANTS[v.FULL], "peer": dataclasses.replace(v.VARIANTS[v.BREVITAS], extra="bench-no_such")}
    said = []
    wanted, _ = v.selected(_options(), said.append, absent)
    assert wanted == [v.FULL]
    assert "no_such is not installed" in said[0]
    with pytest.raises(ValueError, match=r"bench-no_such"):
        v.selected(_options(only=["peer"]), said.append, absent)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="expected 'runs'"):
        results.load(tmp_path / "x.json")
