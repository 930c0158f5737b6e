import json
import math
from itertools import product

import lightning.pytorch as pl
import pytest
import torch
from scipy import stats
from timm.layers import Conv2dSame
from torch import nn

from benchmarks.findings import goals, relaxed
from benchmarks.findings.__main__ import main
from benchmarks.findings.allocation import (
    allocations,
    hessian_traces,
    least_costly,
    narrowest,
    random_levels,
    squared_errors,
)
from benchmarks.findings.data import Images, load
from benchmarks.findings.methods import (
    AT_FIXED,
    CALIBRATED,
    CHANNELS,
    DEFAULTS,
    EXPECTATION,
    FULL,
    LEARNED,
    LEARNED_DEFAULTS,
    LSQ,
    LSQ_OFFSET,
    LSQ_PLUS,
    METHODS,
    PULLED,
    PULLED_LSQ,
    RANDOM,
    RELEARNED,
    RQ,
    UNDRAWN,
    Task,
    inner_layers,
    trained_as,
)
from benchmarks.findings.network import NETWORKS, SmallResNet
from benchmarks.findings.plan import FROZEN, THREE, TWO, done, learned_run, plan, rate_of, rates, ready, searches
from benchmarks.findings.report import summary, write_report
from benchmarks.findings.results import cell
from benchmarks.findings.rows import RESULTS, Rows
from benchmarks.findings.runs import RATES, SCALES, SEARCH_SEED, SEEDS, Run
from benchmarks.findings.statistics import estimate, paired
from benchmarks.findings.train import _fit, clusters, train, train_start, weight_errors
from benchmarks.quantized_layer import Bits, LearnedStep, QuantizedLayer
from benchmarks.train_step.measure import ROOT
from cpq_lightning import attach, calibrate
from cpq_lightning.bitwidth.cost import average_bits
from cpq_lightning.data import fashion_mnist
from cpq_lightning.nn.quantizer import Quantizer
from tests.images import fashion_mnist as make_fashion_mnist

LAYERS = dict.fromkeys(inner_layers(SmallResNet()), 3.0)


def row(run, accuracy=0.8, error=0.04, val=0.8, levels=LAYERS):
    return {
        **run.to_dict(), "lr": run.rate or RATES[0], "accuracy": accuracy, "val_accuracy": val,
        "mean_bits": float(run.weight_bits),
        "weight_error": None if run.method == FULL else error, "levels": levels, "clusters": [1, 2, 3] * 40,
        "seconds": 1.0, "commit": "abc", "device": "cpu", "versions": {"torch": "2"}, "config": None,
    }  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "findings.jsonl")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_defaults_are_trained_as_a_step_each_channel(bits):
    """One row for both names: their settings give the same quantizers, from two bits on."""
    assert trained_as(DEFAULTS, 1) == DEFAULTS
    made, images = {}, torch.randn(8, 1, 28, 28)
    for name in (DEFAULTS, trained_as(DEFAULTS, bits)):
        torch.manual_seed(0)
        method = METHODS[name].make(Task(SmallResNet(), bits, bits, images))
        made[name] = calibrate(attach(method.network, method.config), [images]).state_dict()
    first, second = made.values()
    assert len(made) == 2
    assert first.keys() == second.keys()
    for key, value in first.items():
        # The headers differ in the name of the grid alone: what the grid is stands in other places.
        assert value.equal(second[key]) or key.endswith("weight_quantizer.state"), key
    quantizers_of = [
        [Quantizer.from_state({"state": v}) for k, v in state.items() if k.endswith(".state")]
        for state in made.values()
    ]
    for ours, theirs in zip(*quantizers_of, strict=True):
        assert ours.settings._replace(grid="") == theirs.settings._replace(grid="")
        assert ours.start_scale.equal(theirs.start_scale)


# Rows


def test_rows_are_kept_and_the_last_of_two_counts(rows):
    run = Run("20k", LSQ, 3, 3, 0)
    rows.append(row(run, 0.8))
    rows.append(row(run, 0.9))
    again = Rows(rows.path)
    assert run in again
    assert len(again) == 1
    assert again[run]["accuracy"] == 0.9
    assert len(rows.path.read_text().splitlines()) == 2


def test_two_campaigns_may_add_to_one_file(rows):
    other, runs = Rows(rows.path), [Run("20k", LSQ, 3, 3, seed) for seed in range(4)]
    for campaign, run in zip((rows, other, rows, other), runs, strict=True):
        campaign.append(row(run))
    rows.read()
    assert all(run in rows for run in runs)


def test_a_line_that_was_cut_off_is_a_run_that_is_not_done(rows):
    first, second = (Run("20k", LSQ, 3, 3, seed) for seed in (0, 1))
    rows.append(row(first))
    with rows.path.open("a") as file:
        file.write(json.dumps(row(second))[:50])
    again = Rows(rows.path)
    assert second not in again
    again.append(row(second))
    assert [Run.of(r) for r in Rows(rows.path).all()] == [first, second]


def test_a_file_of_something_else_is_refused_and_left(rows):
    rows.path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no row"):
        Rows(rows.path)
    assert rows.path.read_text() == '{"a": 1}\n'


# The plan


@pytest.mark.parametrize("scale", SCALES)
def test_a_run_stands_behind_all_that_it_waits_for(scale):
    runs = plan(scale)
    assert len(runs) == len(set(runs))
    place = {run: i for i, run in enumerate(runs)}
    for run in runs:
        needed = [] if run.rate else searches(run.scale, METHODS[run.method].family)
        source = learned_run(run)
        needed += [source] if source else []
        assert all(place[other] < place[run] for other in needed), run.title
    assert {run.seed for run in runs if run.rate is None} == set(SCALES[scale].seeds)
    if scale == "20k":
        everywhere = {run.method for each in SCALES for run in plan(each)}
        assert everywhere == METHODS.keys()


@pytest.mark.parametrize("name", ["resnet", "separable"])
def test_all_allocations_of_a_network_can_be_tried(name):
    network = NETWORKS[name]()
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    sizes = inner_layers(network)
    drawn = random_levels(sizes, 3.0, 0)
    assert average_bits((n, drawn[layer]) for layer, n in sizes.items()) == pytest.approx(3, abs=0.02)


def test_the_other_scale_searches_no_rates_of_its_own():
    assert {run.scale for run in plan("60k") if run.rate is not None} == {"20k"}


def test_the_larger_scale_finishes_a_seed_before_the_next():
    seeds = [run.seed for run in plan("60k") if run.rate is None and run.method != FULL]
    assert seeds == sorted(seeds)


def test_the_rate_with_the_best_held_out_mean_is_taken(rows):
    run = Run("20k", LSQ, 3, 3, 0)
    assert not ready(run, rows)
    for search in searches("20k", LSQ):
        assert search.seed == SEARCH_SEED
        # At four bits another rate is the best, by less.
        better = {(2, RATES[1]): 0.9, (4, RATES[0]): 0.82}.get((search.weight_bits, search.rate), 0.8)
        rows.append(row(search, accuracy=1 - better, val=better))
    assert rate_of(run, rows) == RATES[1]
    assert ready(run, rows)


def test_a_network_whose_best_rates_lie_far_apart_has_one_for_each_width(rows):
    scale = "10k-mobile"
    tried = rates(LSQ, scale)
    best = dict(zip(SCALES[scale].searched, tried, strict=False))
    for search in searches(scale, LSQ):
        width = (search.weight_bits, search.act_bits)
        # On average the last one is the best.
        rows.append(row(search, val=0.9 if best[width] == search.rate else 0.89 if search.rate == tried[-1] else 0.1))
    for (w, a), rate in best.items():
        assert rate_of(Run(scale, LSQ, w, a, 0), rows) == rate
    assert rate_of(Run(scale, LSQ, 2.0, 8, 0), rows) == tried[-1]


def test_a_single_rate_is_not_searched(rows):
    run = Run("5k-efficientnet", LSQ, 3, 3, 0)
    [rate] = SCALES[run.scale].rates
    assert not searches(run.scale, LSQ)
    assert rate_of(run, rows) == rate
    assert ready(run, rows)


@pytest.mark.parametrize("family", dict.fromkeys(m.family for m in METHODS.values() if m.family))
def test_no_published_rate_is_at_the_edge_of_what_was_searched(family):
    rate = rate_of(Run("20k", family, 0, 0, 0), Rows())
    assert rate is None or rate in rates(family)[1:-1]


def test_a_row_of_another_rate_than_the_search_s_counts_as_not_done(rows):
    for search in searches("20k", LSQ):
        rows.append(row(search, val=0.9 if search.rate == RATES[0] else 0.8))
    run = Run("20k", LSQ, 3, 3, 0)
    rows.append({**row(run), "lr": RATES[1]})
    assert not done(run, rows)
    assert cell(rows, "20k", LSQ, 3, 3) is None
    rows.append({**row(run), "lr": RATES[0]})
    assert done(run, rows)
    assert cell(rows, "20k", LSQ, 3, 3).rows == [rows[run]]


def test_a_run_waits_for_the_widths_that_it_takes(rows):
    for search in searches("20k", EXPECTATION):
        rows.append(row(search))
    run = Run("20k", RELEARNED, 3.0, 3, 2)
    assert not ready(run, rows)
    rows.append(row(Run("20k", LEARNED, 3.0, 3, 2)))
    assert ready(run, rows)


# Statistics


def test_the_paired_interval_is_students():
    ours, theirs = {0: 1.0, 1: 2.5, 2: 3.0, 7: 9.0}, {2: 2.0, 1: 2.0, 0: 1.5, 8: 0.0}
    found = paired(ours, theirs)
    expected = stats.ttest_rel([1.0, 2.5, 3.0], [1.5, 2.0, 2.0]).confidence_interval()
    assert found.count == 3
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(expected))


def test_one_value_has_no_interval_and_none_no_mean():
    assert estimate([2.0]).half is None
    assert not estimate([2.0]).above
    assert estimate([]) is None
    assert paired({0: 1.0}, {1: 1.0}) is None


# Widths that are not learned


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0])
def test_random_levels_meet_the_average_and_differ(average):
    sizes = inner_layers(SmallResNet())
    drawn = [random_levels(sizes, average, seed) for seed in range(5)]
    assert len({tuple(levels.values()) for levels in drawn}) == 5
    for levels in drawn:
        found = sum(sizes[n] * b for n, b in levels.items()) / sum(sizes.values())
        assert found == pytest.approx(average, abs=0.0201)
        assert all(narrowest(average) <= bits <= 8 for bits in levels.values())


def test_allocations_are_all_that_there_are():
    sizes = (100, 50, 10, 400)
    tried = [b for b in product(range(2, 9), repeat=4) if abs(_mean(sizes, b) - 3.0) <= 0.02]
    assert {tuple(way) for way in allocations(sizes, 3.0).tolist()} == set(tried)
    assert len(tried) > 5


def _mean(sizes, bits):
    return sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes)


def test_the_least_costly_widths_are_those_of_all_that_were_tried():
    g = torch.Generator().manual_seed(0)
    sizes = {"a": 100, "b": 50, "c": 10, "d": 400}
    costs = {name: torch.rand(7, generator=g).sort(descending=True).values.tolist() for name in sizes}
    tried = [
        (sum(costs[n][b - 2] for n, b in zip(sizes, bits, strict=True)), bits)
        for bits in product(range(2, 9), repeat=4)
        if abs(_mean(sizes.values(), bits) - 3.0) <= 0.02
    ]
    assert tuple(least_costly(costs, sizes, 3.0).values()) == min(tried)[1]


def test_errors_fall_with_the_bits():
    errors = squared_errors(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), 2)
    assert len(errors) == 7
    assert errors == sorted(errors, reverse=True)


def test_traces_are_those_of_the_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    images, labels = torch.randn(512, 3), torch.randint(0, 2, (512,))
    found = hessian_traces(model, ["0", "2"], images, labels, seed=0)
    # What trains on is as it was.
    assert all(module.training for module in model.modules())
    assert model[0].weight.grad is None
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight

        def loss(values, name=name):
            parameters = {f"{name}.weight": values}
            return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, images), labels)

        hessian = torch.autograd.functional.hessian(loss, weight.detach())
        exact = hessian.reshape(weight.numel(), weight.numel()).trace() / weight.numel()
        assert found[name] == pytest.approx(float(exact), rel=0.35)


# Methods


@pytest.mark.parametrize("signed", [True, False])
def test_learned_steps_are_lsqs(signed):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = LearnedStep(3, signed)
    out = quantizer(x)
    low, high = (-4, 3) if signed else (0, 7)
    step = quantizer.step.item()
    assert step == pytest.approx(2 * x.abs().mean().item() / math.sqrt(high), rel=1e-6)
    torch.testing.assert_close(out, step * (x / step).round().clamp(low, high))
    torch.testing.assert_close(quantizer.nearest(x), out)
    out.sum().backward()
    u = x.detach() / step
    inside = (u.round() >= low) & (u.round() <= high)
    assert x.grad.equal(inside.float())
    by_step = torch.where(inside, u.round() - u, u.clamp(low, high)).sum() / math.sqrt(64 * high)
    # Of the logarithm, that is times the step.
    torch.testing.assert_close(quantizer.log_scale.grad[0], by_step * step, rtol=1e-4, atol=1e-5)


def test_a_convolution_that_pads_by_itself_does_so_in_a_peer_too():
    torch.manual_seed(0)
    layer, x = Conv2dSame(3, 8, 5, stride=2), torch.randn(2, 3, 7, 7)
    peer = QuantizedLayer(layer, Bits(8, 8, signed=True), LearnedStep).train()
    torch.testing.assert_close(peer(x), layer(x), rtol=0, atol=0.15)
    peer(x).sum().backward()
    assert layer.weight.grad.any()


def test_a_start_at_the_least_error_has_less_of_it():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 8):
        own, fitted = LearnedStep(bits, True), LearnedStep(bits, True, least_error=True)
        assert (fitted(x) - x).square().sum() < (own(x) - x).square().sum()


def test_relaxed_samples_have_the_probabilities_of_the_noise():
    u, s = torch.full((20000,), 0.3), torch.tensor(1 / 3)
    uniform = torch.rand(3, 20000, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
    found = relaxed._sample(u, s, uniform, torch.tensor(-4.0), torch.tensor(3.0))
    points = torch.tensor([-1.0, 0.0, 1.0])
    p = torch.sigmoid((points + 0.5 - 0.3) / s) - torch.sigmoid((points - 0.5 - 0.3) / s)
    exact = float((p * points).sum() / p.sum())
    # At temperature 1 a mixture leans to the middle of its points, not by more than this.
    assert float(found.mean()) == pytest.approx(exact, abs=0.1)
    assert found.min() >= -1
    assert found.max() <= 1


def test_relaxed_gradients_are_finite_far_beyond_the_grid():
    u = torch.tensor([-1e6, -4.0, 3.0, 1e6], requires_grad=True)
    uniform = torch.full((3, 4), 0.5)
    found = relaxed._sample(u, torch.tensor(1 / 3), uniform, torch.tensor(-4.0), torch.tensor(3.0))
    found.sum().backward()
    assert found[0] == -4
    assert found[3] == 3
    assert u.grad.isfinite().all()


def test_evaluation_rounds():
    quantizer = relaxed.Relaxed(3, True).eval()
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    step = quantizer(x) * 0 + quantizer.step
    torch.testing.assert_close(quantizer(x), step * (x / step).round().clamp(-4, 3))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.missing])
def test_every_method_makes_something_that_trains(name, monkeypatch):
    monkeypatch.setattr(relaxed, "_compiled", relaxed._sample)
    network = SmallResNet()
    levels = dict.fromkeys(inner_layers(network), 2) if METHODS[name].levels else None
    made = METHODS[name].make(Task(network, 3.0, 3, torch.randn(8, 1, 28, 28), levels))
    assert made.network is network
    assert all(module.training for module in network.modules())
    assert (made.config is None) == (name in (FULL, LSQ, PULLED_LSQ, LSQ_PLUS, LSQ_OFFSET, RQ))


# Whole runs


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", make_fashion_mnist(tmp_path / "debian", count=400))
    fashion_mnist.FashionMNISTDataModule(str(tmp_path / "data")).prepare_data()
    return str(tmp_path / "data")


def test_runs_from_the_start_to_their_rows(data, tmp_path):
    start = tmp_path / "start.safetensors"
    train_start(SCALES["tiny"], data, start)
    before = start.read_bytes()
    train_start(SCALES["tiny"], data, start)
    assert start.read_bytes() == before
    learned = train(Run("tiny", LEARNED, 3.0, 3, 0), 0.001, start, data)
    assert learned["mean_bits"] == pytest.approx(3.0, abs=0.05)
    assert set(learned["levels"]) == set(LAYERS)
    again = train(Run("tiny", RELEARNED, 3.0, 3, 0), 0.001, start, data, learned)
    assert again["levels"] == learned["levels"]
    pulled, left = (
        train(Run("tiny", name, 3, 3, 0), 0.001, start, data) for name in (next(iter(AT_FIXED)), EXPECTATION)
    )
    assert pulled["weight_error"] < left["weight_error"]
    same = train(Run("tiny", EXPECTATION, 3, 3, 0), 0.001, start, data)
    assert all(same[key] == left[key] for key in left if key not in ("seconds", "time"))
    drawn = train(Run("tiny", RANDOM, 3.0, 3, 0), 0.001, start, data)
    assert drawn["levels"] != learned["levels"]
    undrawn = train(Run("tiny", UNDRAWN, 3.0, 3, 0), 0.001, start, data)
    assert undrawn["levels"].keys() == learned["levels"].keys()
    calibrated = train(Run("tiny", CALIBRATED, 3, 3, 0), 0.001, start, data)
    assert calibrated["weight_error"] < 0.1
    assert calibrated["val_accuracy"] > 0
    json.dumps([learned, again, pulled, drawn, undrawn, calibrated])


def test_a_network_in_full_precision_has_no_error_and_no_clusters():
    assert weight_errors(SmallResNet()) == {}
    assert clusters(SmallResNet()) == []


class Seen(pl.Callback):
    """The first pixels of every training batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].flatten().sum().item())


def test_runs_of_one_seed_see_the_same_batches(data, tmp_path):
    seen = {}
    for name, seed in ((FULL, 0), (LSQ, 0), (EXPECTATION, 0), (EXPECTATION, 1)):
        made = METHODS[name].make(Task(SmallResNet(), 3.0, 3, torch.randn(8, 1, 28, 28)))
        watch = Seen()
        made.callbacks.append(watch)
        _fit(made, Images(data, 256, seed), 0.001, 3, "cpu")
        seen[name, seed] = watch.batches
    assert len(seen[FULL, 0]) == 6
    # No two epochs alike.
    assert len(set(seen[FULL, 0])) == 6
    assert seen[FULL, 0] == seen[LSQ, 0] == seen[EXPECTATION, 0]
    assert seen[EXPECTATION, 1] != seen[EXPECTATION, 0]


def test_held_out_images_train_nothing(data):
    images, labels = load(data, True)
    kept = Images(data, 256, 0)
    assert kept.holds_out
    assert not Images(data, len(labels), 0).holds_out
    assert len(kept.val_dataloader().dataset.labels) == len(labels) // 6
    assert kept.val_dataloader().dataset.images.equal(images[-(len(labels) // 6) :])
    assert kept.train_dataloader().dataset.images.equal(images[:256])


def test_the_command_goes_on_where_it_stopped(data, tmp_path):
    rows = Rows(tmp_path / "results" / "findings.jsonl")
    kept = [*searches("tiny", FULL)[1:], *(Run("tiny", FULL, 32, 32, seed) for seed in SEEDS[1:])]
    for run in kept:
        # All rates that are done are bad: the one that is left is the best.
        rows.append(row(run, val=0.0) if run.rate else {**row(run), "lr": RATES[0]})
    written = rows.path.read_text()
    settings = ["--data", data, "--scale", "tiny", "--only", FULL, "--workers", "1", "--results", str(rows.path)]
    assert main([*settings, "--show"]) == 0
    assert rows.path.read_text() == written
    assert main(settings) == 0
    assert rows.path.read_text().startswith(written)
    search, first = [json.loads(line) for line in rows.path.read_text().removeprefix(written).splitlines()]
    assert Run.of(search) == searches("tiny", FULL)[0]
    assert Run.of(first) == Run("tiny", FULL, 32, 32, SEEDS[0])
    assert first["lr"] == RATES[0]
    assert {"method", "weight_bits", "act_bits", "seed", "accuracy", "weight_error", "levels"} <= first.keys()
    assert {"config", "versions", "commit", "seconds", "device"} <= first.keys()
    assert "full precision" in (rows.path.parent / "findings.md").read_text()
    assert all(done(run, Rows(rows.path)) for run in kept)


def test_a_part_of_the_campaign_is_asked_for_by_methods_widths_and_seeds(tmp_path, capsys):
    asked = ["--scale", "10k-silu", "--only", LSQ, FULL, "--widths", "W3A3", "W2A2", "--seeds", "2", "--show"]
    assert main([*asked, "--results", str(tmp_path / "findings.jsonl")]) == 0
    shown = capsys.readouterr().err
    assert shown.count("rate ") == len([*searches("10k-silu", LSQ), *searches("10k-silu", FULL)])
    assert shown.count("seed 0 ") == shown.count("seed 1 ") == 2
    assert "seed 2 " not in shown
    assert "W4A4" not in shown
    # A variant waits for the search of its family.
    assert main([*asked[:3], CHANNELS, *asked[5:], "--results", str(tmp_path / "findings.jsonl")]) == 0
    assert capsys.readouterr().err.count("rate ") == len(searches("10k-silu", EXPECTATION))


def test_data_that_are_not_there_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "nothing"), "--results", str(tmp_path / "findings.jsonl")])
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err
    assert not (tmp_path / "findings.jsonl").exists()


@pytest.mark.parametrize("arguments", [["--scale", "1k"], ["--only", "LSQ++"]])
def test_unknown_methods_and_scales_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "invalid choice" in capsys.readouterr().err


# The report


def _search(rows, *families):
    for family in families:
        for search in searches("20k", family):
            rows.append(row(search, val=0.9 if search.rate == RATES[0] else 0.8))


def test_goals_are_told_by_the_rows(rows):
    for seed, noise in zip(SEEDS, (0.0, 0.001, -0.001, 0.002, -0.002), strict=True):
        rows.append(row(Run("20k", LSQ, 3, 3, seed), 0.88 + noise, error=0.04))
        rows.append(row(Run("20k", PULLED, 3, 3, seed), 0.87 + noise / 2, error=0.03))
        rows.append(row(Run("20k", LEARNED, 3.0, 3, seed), 0.885 + noise))
        rows.append(row(Run("20k", RANDOM, 3.0, 3, seed), 0.8 + 10 * noise))
    _search(rows, LSQ, EXPECTATION)
    below, error, wins, drawn = goals.check(rows, "20k")
    assert "not below" in below
    assert "**does not hold**" in below
    assert "-1.00" in below
    assert "**does not hold**, 0.750 of it" in error
    assert "**holds**, on 5 of 5, +0.50" in wins
    assert "**holds**, +8.50" in drawn


def test_goals_on_networks_that_are_hard_to_quantize(rows):
    scale = "10k-mobile"
    for family in (LSQ, LSQ_PLUS, EXPECTATION, FULL):
        for search in searches(scale, family):
            rows.append(row(search, val=0.9 if search.rate == RATES[0] else 0.8))
    for seed, noise in zip(SEEDS, (0.0, 0.001, -0.001, 0.002, -0.002), strict=True):
        rows.append(row(Run(scale, FULL, 32, 32, seed), 0.87 + noise))
        for w in (3, 4):
            for method, accuracy in ((LSQ, 0.85), (LSQ_PLUS, 0.86), (DEFAULTS, 0.862)):
                run = Run(scale, trained_as(method, w), w, w, seed)
                rows.append(row(run, accuracy + noise / (1 + (method == LSQ))))
        rows.append(row(Run(scale, EXPECTATION, 3, 3, seed), 0.86 + noise))
        rows.append(row(Run(scale, FROZEN, 3, 3, seed), 0.85 + noise / 2))
        rows.append(row(Run(scale, trained_as(DEFAULTS, 2), 2.0, 8, seed), 0.85 + noise))
        rows.append(row(Run(scale, LEARNED_DEFAULTS, 2.0, 8, seed), 0.86 + noise / 2))
    at_four, lsq, at_three, ceiling, learned, frozen = goals.check(rows, scale)
    assert "W4A4, the defaults not behind LSQ+: **holds**, +0.20" in at_four
    assert "W3A3, the defaults ahead of LSQ by more than the interval: **holds**, +1.20" in lsq
    assert "W3A3, the defaults not behind LSQ+: **holds**" in at_three
    assert "W4A4, the defaults within 0.5 points of full precision: **does not hold**, -0.80" in ceiling
    assert "ahead of 2 bits everywhere by more than the interval: **holds**, +1.00" in learned
    assert "W3A3, oscillating weights frozen, ahead of training without it" in frozen
    assert "**does not hold**, -1.00" in frozen
    text = write_report(rows).read_text()
    network = "a network like MobileNetV3, 10,000 images"
    assert f"| {network} | W3A3 | 87.00 ± 0.20 (5) | 85.00 ± 0.10 (5) | 86.00 ± 0.20 (5) | 86.20 ± 0.20 (5) |" in text
    assert f"| {network} | 85.00 ± 0.20 (5) | 86.00 ± 0.10 (5) | +1.00 ± 0.10 |" in text
    assert "| W4A4, the defaults within 0.5 points of full precision | **does not hold**, -0.80 ± 0.00 |" in text
    # The README has the tables of all networks, and none of one that is hard to quantize alone.
    readme = summary(rows)
    assert network in readme
    assert "full precision 87" not in readme


def test_goals_are_asked_where_they_mean_something(rows):
    asked = {goal.title: goal.scales for goal in goals.GOALS}
    [one_bit] = [scales for title, scales in asked.items() if title.startswith("W1A8")]
    assert one_bit == ("20k",)
    [learned] = [scales for title, scales in asked.items() if title.startswith("Learned")]
    assert set(learned) == {*goals.NETWORKS} - {"20k"}
    assert len(asked) == len(goals.GOALS)
    for search in searches("20k", EXPECTATION):
        rows.append(row(search, val=0.9 if search.rate == RATES[0] else 0.8))
    for seed in SEEDS[: goals.ENOUGH]:
        rows.append(row(Run("20k", DEFAULTS, 1.0, 8, seed), 0.87 + seed / 1000))
        rows.append(row(Run("20k", trained_as(DEFAULTS, 2), 2.0, 8, seed), 0.88 + seed / 1000))
    assert list(goals.check(rows, "20k")) == [
        "W1A8, the defaults within 1.5 points of W2A8: **holds**, -1.00 ± 0.00 (3 seeds)."
    ]


def test_one_seed_decides_nothing(rows):
    rows.append(row(Run("20k", LSQ, 3, 3, 0), 0.8))
    rows.append(row(Run("20k", PULLED, 3, 3, 0), 0.9, error=0.001))
    _search(rows, LSQ, EXPECTATION)
    assert len(list(goals.check(rows, "20k"))) == 1
    assert all("open, with 1 of 5 seeds" in sentence for sentence in goals.check(rows, "20k"))


def test_the_report_is_made_of_the_rows(rows):
    for run in plan("20k"):
        # One that is unfinished says so.
        if run != Run("20k", LSQ, 2, 2, 4):
            rows.append(
                row(
                    run,
                    val=0.9 if run.rate == RATES[0] else 0.8,
                    accuracy=0.8 + run.seed / 1000 % 0.01,
                    levels={**LAYERS, "layer1.conv1": 2.0 + run.seed % 5},
                )
            )
    text = write_report(rows).read_text()
    unfinished = next(line for line in text.splitlines() if "(4 of 5 seeds)" in line)
    assert unfinished.startswith("| LSQ | 80.15 ± ")
    assert "### 3. Learned levels" in text
    assert "| `layer1.conv1` | 4.0 ± 1.58 |" in text
    assert "abc" in text
    for name in ("clusters", "levels", "allocation"):
        assert f"findings_{name}_20k.png" in text
        assert (rows.path.parent / f"findings_{name}_20k.png").stat().st_size > 5000
    assert "nan" not in text
    assert "With DropBits the variance is 1.00 times that without" in text
    assert "| nested by range |" in text
    table = summary(rows)
    assert "20,000 images, a ResNet; full precision" in table
    assert "**CPQ expectation, ClusterPull**" in table


def test_the_summary_has_each_scale_and_of_another_network_its_levels(rows):
    _search(rows, EXPECTATION)
    _search(rows, LSQ)
    for seed in SEEDS:
        for scale, method in product(("20k", "60k"), (LSQ, PULLED)):
            rows.append(row(Run(scale, method, 3, 3, seed)))
        rows.append(row(Run("20k-separable", LEARNED, *THREE, seed)))
    heads = [line for line in summary(rows).splitlines() if line.endswith(".")]
    assert heads == [
        "20,000 images, a ResNet.",
        "60,000 images, a ResNet.",
        "20,000 images, depthwise-separable convolutions.",
    ]
    assert summary(rows).count("| learned levels |") == 1


def test_levels_without_any_variance_are_told(rows):
    _search(rows, EXPECTATION)
    for seed in SEEDS:
        rows.append(row(Run("20k", LEARNED, *TWO, seed), levels=LAYERS))
        rows.append(row(Run("20k", UNDRAWN, *TWO, seed), levels={**LAYERS, "layer1.conv1": 2.0 + seed % 5}))
    text = write_report(rows).read_text()
    assert f"all seeds learn the same widths; without, the variance is {2.5 / len(LAYERS):.2f}." in text


def test_without_rows_the_report_says_so(rows):
    assert "No rows yet" in write_report(rows).read_text()
    assert summary(rows) == "No rows yet.\n"


def test_what_is_published_is_made_of_the_rows_that_are(tmp_path):
    folder = RESULTS.parent
    copy = tmp_path / RESULTS.name
    copy.write_bytes(RESULTS.read_bytes())
    rows = Rows(copy)
    assert write_report(rows).read_text() == (folder / "findings.md").read_text()
    for name in tmp_path.glob("*.png"):
        assert (folder / name.name).is_file()
    readme = (ROOT / "README.md").read_text()
    _, behind = readme.split("<!-- python -m benchmarks.findings --summary -->\n\n")
    assert behind.split("\n<!-- end -->")[0] == summary(rows)
