"""A model inside what others put around one is what it wraps: names, values, files, hooks."""

import copy
import importlib
import inspect
import pkgutil
import warnings
from types import SimpleNamespace

import lightning
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_map

import cpq_lightning
from cpq_lightning import CPQConfig, attach, calibrate, detach, export_model, load_quantized
from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.calibrate import recording
from cpq_lightning.attach.first_forward import record_forward
from cpq_lightning.attach.first_forward import report_audit as report
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import RangeTracker
from cpq_lightning.attach.wrapping import unwrapped
from tests.marks import thorough

PACKAGES = [
    importlib.import_module(f"cpq_lightning.{name}") for name in ("attach", "bitwidth", "packing", "report", "export")
]
# Whatever a module of theirs has.
INSIDE = SimpleNamespace()
for package in PACKAGES:
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            setattr(INSIDE, name, thing)
X = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
CONFIG = CPQConfig(weight_bits=3, attention=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x).relu()
        return self.c(y @ self.b(y).mT @ y)


@pytest.fixture
def one_process(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('d')}/s", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def in_fabric(model):
    return lightning.Fabric(accelerator="cpu", devices=1).setup_module(model)


WRAPPERS = {
    "compile": compiled,
    "ddp": DistributedDataParallel,
    "dp": DataParallel,
    "fabric": in_fabric,
    "ddp of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of ddp": lambda model: compiled(DistributedDataParallel(model)),
    "fabric of compile": lambda model: in_fabric(compiled(model)),
}
OTHERS = thorough("compile", "compile of ddp", "fabric of compile")
wrapped = pytest.mark.parametrize("wrap", ["ddp", "dp", "fabric", "ddp of compile", *OTHERS])


def quantized():
    torch.manual_seed(0)
    return calibrate(attach(Net(), CONFIG, example_inputs=X), [X]).eval()


def states(model):
    return [(name, q.state, q.active) for name, q in quantizers(model)]


def audited(model):
    with Audit(model) as audit:
        unwrapped(model)(X)
    return audit.report


def noted(model):
    record_forward(model, audited(model))
    report(model, audited(model))
    return [q.execution_index for _, q in quantizers(model)]


def measured(model):
    with recording(model):
        model(X)
    return INSIDE.range_warnings(model), INSIDE.clipped_shares(model), INSIDE.levels(model)


def sampled(model):
    INSIDE.record_samples(model, 4)
    model(X)
    found, obstacle = INSIDE.recorded_samples(model), INSIDE.export_obstacle(model)
    INSIDE.stop_recording_samples(model)
    return found.inputs, obstacle, hooks(model)


def tracked(model):
    tracker = RangeTracker(model)
    with torch.no_grad():
        unwrapped(model).b.weight.mul_(9)
    return len(tracker.renew_weights()), states(model)


def renewed(model):
    with torch.no_grad():
        unwrapped(model).b.weight.mul_(9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        INSIDE.refit_rewritten(model)
    return [str(w.message) for w in said], states(model)


def changed(change):
    return lambda model: (change(model), states(model))[1]


def hooks(model):
    INSIDE.forget_first_forwards(model)
    return len(unwrapped(model)._forward_hooks), len(unwrapped(model)._forward_pre_hooks)


def detached(model):
    assert detach(model) is model
    return unwrapped(model)(X), list(unwrapped(model).state_dict())


def covered(model):
    return [INSIDE.coverage(model), INSIDE.coverage(model, example_inputs=X)]


def remembered(model):
    INSIDE.remember_products(model, audited(model))
    return INSIDE.coverage(model)


def configured(model):
    INSIDE.set_attached_config(model, {"seed": 3})
    return INSIDE.attached_config(model)


def proved(model, tmp_path):
    return export_model(model, tmp_path, samples=X).verification


# What each public function that takes a model does with one, as something to compare.
FUNCTIONS = {
    "Audit": audited,
    "RangeTracker": tracked,
    "as_batch_call": lambda model: INSIDE.as_batch_call(model, {"x": X}),
    "as_call": lambda model: INSIDE.as_call(model, {"x": X}),
    "attached_config": INSIDE.attached_config,
    "avoid_fused_paths": lambda model: INSIDE.avoid_fused_paths(model, nn.Linear),
    "bit_operations": INSIDE.bit_operations,
    "bypassed": lambda model: list(map(len, INSIDE.bypassed(model))),
    "byte_cost": lambda model: INSIDE.byte_cost(model, []).constant,
    "calibrate": changed(lambda model: calibrate(model, [2 * X])),
    "call_projections": INSIDE.call_projections,
    "clipped_shares": INSIDE.clipped_shares,
    "settle_first_and_last": changed(lambda model: INSIDE.settle_first_and_last(model, ["c", "a", "b"])),
    "coverage": covered,
    "recorded_coverage": lambda model: INSIDE.recorded_coverage(model, once_active=True),
    "detach": detached,
    "export_model": proved,
    "float_bytes": INSIDE.float_bytes,
    "forget_first_forwards": hooks,
    "forward_signature": INSIDE.forward_signature,
    "full_precision_layers": INSIDE.full_precision_layers,
    "full_precision_messages": INSIDE.full_precision_messages,
    "full_precision_copy": lambda model: list(INSIDE.full_precision_copy(model).state_dict()),
    "is_attached": INSIDE.is_attached,
    "late_layers": lambda model: list(INSIDE.late_layers(model)),
    "late_message": lambda model: INSIDE.late_message(model, {"a": 1}),
    "learning_quantizers": INSIDE.learning_quantizers,
    "levels": INSIDE.levels,
    "manifest": INSIDE.manifest,
    "mean_width": lambda model: INSIDE.mean_width(model, "weight"),
    "model_costs": INSIDE.model_costs,
    "modules_with_products": lambda model: [name for name, _ in INSIDE.modules_with_products(model)],
    "record_forward": noted,
    "record_uncalled": changed(lambda model: INSIDE.record_uncalled(model, audited(model))),
    "packed_size": INSIDE.packed_size,
    "quantizable_layers": lambda model: list(INSIDE.quantizable_layers(model)),
    "quantized_layers": lambda model: [name for name, _ in quantized_layers(model)],
    "quantized_operands": lambda model: [name for name, _ in INSIDE.quantized_operands(model)],
    "quantizers": states,
    "range_warnings": INSIDE.range_warnings,
    "read_layers": lambda model: [name for name, _ in INSIDE.read_layers(model)],
    "record_samples": sampled,
    "recording": measured,
    "refit": changed(INSIDE.refit),
    "remember_products": remembered,
    "refit_rewritten": renewed,
    "rewritten_weights": INSIDE.rewritten_weights,
    "set_active": changed(lambda model: INSIDE.set_active(model, False)),
    "set_attached_config": configured,
    "set_audited": lambda model: [INSIDE.set_audited(model, mode) for mode in (True, False)],
    "set_noise_step": changed(lambda model: INSIDE.set_noise_step(model, 3)),
    "tied_readers": lambda model: [name for name, _ in INSIDE.tied_readers(model)],
    "unwrapped": lambda model: type(unwrapped(model)),
    "weight_histograms": INSIDE.weight_histograms,
    "width_cost": lambda model: INSIDE.width_cost(model, [], "bops").constant,
    "widths_by_name": INSIDE.widths_by_name,
    "write_levels": lambda model, tmp_path: INSIDE.write_levels(model, tmp_path / "levels.json").read_text(),
}
# In tests of their own below; called by others above; of a single layer; and what is to tell compiled code from other.
APART = {"attach", "load_quantized", "recorded_samples", "export_obstacle", "report_audit", "stop_recording_samples"}
APART |= {"quantize_products", "weight_parameters", "auditable", "source_of", "is_training"}


def takes_a_model(thing):
    if (inspect.isclass(thing) and issubclass(thing, Exception)) or not (
        inspect.isclass(thing) or inspect.isfunction(thing)
    ):
        return False
    annotations = [str(p.annotation) for p in inspect.signature(thing).parameters.values()]
    return any(a in ("M", "nn.Module", "nn.Module | None") for a in annotations)


def test_all_public_functions_that_take_a_model_are_listed():
    public = {n: getattr(package, n) for package in (cpq_lightning, *PACKAGES) for n in getattr(package, "__all__", ())}
    found = {name for name, thing in public.items() if takes_a_model(thing)}
    assert found <= set(FUNCTIONS) | APART


def values(thing):
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, thing)


@wrapped
def test_a_wrapped_model_is_told_as_what_it_wraps(wrap, one_process, tmp_path):
    original = quantized()
    for name, function in FUNCTIONS.items():
        more = [tmp_path] if "tmp_path" in inspect.signature(function).parameters else []
        plain, inside = copy.deepcopy(original), WRAPPERS[wrap](copy.deepcopy(original))
        assert values(function(inside, *more)) == values(function(plain, *more)), name


@wrapped
def test_a_wrapped_model_is_attached_and_computes_the_same(wrap, one_process):
    torch.manual_seed(0)
    inside = WRAPPERS[wrap](Net())
    assert attach(inside, CONFIG, example_inputs=X) is inside
    calibrate(inside, [X])
    inside.eval()
    plain = quantized()
    assert values(states(inside)) == values(states(plain))
    torch.testing.assert_close(inside(X), plain(X))


@wrapped
def test_a_packed_file_loads_into_a_wrapped_network(wrap, one_process, tmp_path):
    model = quantized()
    inside = WRAPPERS[wrap](Net())
    assert load_quantized(export_model(model, tmp_path, samples=X).path, inside) is inside
    torch.testing.assert_close(inside(X), model(X))


@wrapped
def test_a_state_loads_into_a_wrapped_model_which_works_on_inside(wrap, one_process):
    model, inside = quantized(), WRAPPERS[wrap](Net())
    with cpq_lightning.loading():
        inside.load_state_dict(WRAPPERS[wrap](model).state_dict())
    inner = unwrapped(inside).eval()
    assert inner(X).equal(model(X))
    # What an attached model does around its forwards is the inner one's, and goes when that is detached.
    detach(inside)
    assert not inner._forward_hooks
    assert not inside._forward_pre_hooks
    inside.train()(X)


def test_a_model_that_several_processes_train_already_is_refused():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        spread = DistributedDataParallel(Net())
        with pytest.raises(ValueError, match=r"with 2 processes.*wrap it then"):
            attach(spread, CPQConfig())
        with cpq_lightning.loading(), pytest.raises(ValueError, match="with 2 processes"):
            spread.load_state_dict({f"module.{k}": v for k, v in quantized().state_dict().items()})
        assert not INSIDE.is_attached(spread)
        DistributedDataParallel(attach(Net(), CPQConfig()))
    finally:
        dist.destroy_process_group()
