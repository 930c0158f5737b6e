"""The user's optimizers, schedulers and saved states are those of training without quantization."""

import copy
import io
import itertools
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.optim import Lookahead
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.callbacks import BatchNormReestimation, BitBudget, ClusterPull
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.optim.update_clamp import UpdateClamp
from tests.marks import thorough
from tests.models import Classifier, convnet, data

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01)
LEARN = CPQConfig(weight_bits=8, act_bits=8, min_bits=2, learn_bits=True)


def quiet(**settings):
    return CPQCallback(CPQConfig(weight_bits=4, act_bits=4), table=False, levels_file=None, **settings)


def unshuffled():
    return data(shuffle=False), data(shuffle=False)


def groups(trainer):
    return [[len(group["params"]) for group in o.param_groups] for o in trainer.optimizers]


def of_quantizers(module):
    return {id(p) for _, q in quantizers(module) for p in q.parameters()}


# What is the user's ---------------------------------------------------------------------------------------------------


class Recorded(pl.Callback):
    """What a run shows of its optimizers."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen = groups(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved = [
            ([dict(group) for group in state["param_groups"]], len(state["state"]))
            for state in checkpoint["optimizer_states"]
        ]


OPTIMIZERS = {
    "SGD": SGD,
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.05, max_iter=2),
    "Lookahead": lambda p: Lookahead(SGD(p)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_and_saved_states_are_those_of_training_without_quantization(fit, name, tmp_path):
    shown = []
    for ours in ([], [quiet()]):
        recorded = Recorded()
        trainer = fit(Classifier(OPTIMIZERS[name]), [*ours, recorded], max_epochs=1)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        shown.append((recorded.seen, recorded.saved))
    assert shown[0] == shown[1]


def test_rates_keep_their_names_and_callbacks_that_monitor_them_work(fit, tmp_path):
    monitor, stopper = LearningRateMonitor("step"), EarlyStopping("lr-SGD", stopping_threshold=0.006, patience=100)
    module = Classifier(SGD, partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.95))
    trainer = fit(module, [quiet(), monitor, stopper], logger=CSVLogger(tmp_path), max_epochs=9, log_every_n_steps=1)
    assert set(monitor.lrs) == {"lr-SGD"}
    assert 0 < stopper.stopped_epoch < 8
    assert trainer.state.finished


def test_averaging_takes_a_list_of_a_rate_for_each_group(fit):
    average = StochasticWeightAveraging([0.01, 0.02], swa_epoch_start=0.5, annealing_epochs=1)

    def two_groups(parameters):
        first, *rest = parameters
        return SGD([{"params": [first]}, {"params": rest}])

    trainer = fit(Classifier(two_groups), [quiet(), average], max_epochs=6)
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == [0.01, 0.02]


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda step: 0.9**step]),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.01], total_steps=20),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, [0.001], [0.01], step_size_up=2),
])  # fmt: skip
def test_schedulers_with_lists_for_each_group_go_on_and_lead_the_quantizers(fit, make):
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            (companion,) = trainer.callbacks[0]._companions
            names = ("lr", "momentum")
            self.seen.append([o.param_groups[0][n] for n in names for o in (optimizer, companion.optimizer)])

    watch = Watch()
    fit(Classifier(SGD, make), [quiet(lr_factor=0.5), watch])
    assert len({rate for rate, *_ in watch.seen}) > 1
    for rate, own, momentum, own_momentum in watch.seen:
        assert own == pytest.approx(0.5 * rate)
        assert own_momentum == momentum


class Backbone(Classifier):
    def __init__(self, make_optimizer=SGD):
        super().__init__(make_optimizer)
        self.backbone, self.head = self.net[:6], self.net[6]
        self.net = nn.Sequential(self.backbone, self.head)

    def configure_optimizers(self):
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def test_a_callback_that_unfreezes_a_backbone_adds_no_quantizer(fit, tmp_path):
    def run(**settings):
        torch.manual_seed(7)
        module = Backbone()
        tune = BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.1, verbose=False)
        saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        trainer = fit(
            module, [quiet(), tune, saver], max_epochs=5, enable_checkpointing=True, loaders=unshuffled(), **settings
        )
        return module, trainer

    module, trainer = run()
    assert groups(trainer) == [[4, 4]]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not held & of_quantizers(module)
    assert all(float(q.log_scale.detach().abs().max()) > 0 for _, q in quantizers(module))
    # Resumed behind the unfreezing, Lightning gives the backbone another rate, with and without quantizers.
    _, trainer = run(ckpt_path=tmp_path / "epoch=3.ckpt")
    assert groups(trainer) == [[4, 4]]
    resumed, _ = run(ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_full_precision_checkpoint_goes_on_quantized_with_its_optimizer(fit, tmp_path):
    fit(Classifier(SGD), [ModelCheckpoint(tmp_path, filename="plain")], max_epochs=1, enable_checkpointing=True)

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.momenta = [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()]

    watch, module = Watch(), Classifier(SGD)
    module.strict_loading = False
    fit(module, [quiet(), watch], ckpt_path=tmp_path / "plain.ckpt")
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert all(torch.equal(a, b["momentum_buffer"]) for a, b in zip(watch.momenta, saved.values(), strict=True))
    assert all(q.active and q.log_scale.any() for _, q in quantizers(module))


def test_a_search_for_a_rate_in_mid_run_gives_the_quantizers_and_their_momentum_back(fit):
    class Tunable(Classifier):
        lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def state(trainer):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, CPQCallback))
        (companion,) = callback._companions
        state = companion.optimizer.state
        return [t.clone() for p in companion.parameters for t in (p, *(state[p][k] for k in sorted(state[p])))]

    class Finder(LearningRateFinder):
        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before = state(trainer)
                self.lr_find(trainer, pl_module)
                assert len(before) > len(pl_module.net)
                assert all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))

    fit(Tunable(), [quiet(), Finder(num_training_steps=20)], max_epochs=3)


# How the quantizers train ---------------------------------------------------------------------------------------------


def group_by_hand(trainer, pl_module, lr_factor, states):
    """The quantizers in a group of their own in the user's optimizer, whose schedules are followed by hand."""
    (optimizer,) = trainer.optimizers
    own = [p for _, q in quantizers(pl_module) for p in q.range_parameters()]
    ids = {id(p) for p in own}
    (group,) = optimizer.param_groups
    group["params"] = [p for p in group["params"] if id(p) not in ids]
    optimizer.add_param_group({**group, "params": own, "weight_decay": 0.0})
    UpdateClamp(optimizer, own)

    def follow(optimizer, args, kwargs):
        first, second = optimizer.param_groups
        second.update({k: v for k, v in first.items() if k not in ("params", "weight_decay")})
        second["lr"] = first["lr"] * lr_factor

    optimizer.register_step_pre_hook(follow)
    return [SimpleNamespace(optimizer=optimizer, remove=lambda: None)], []


RULES = {
    "SGD": SGD,
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "AdamW, fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
}
PRECISIONS = {
    "plain": {},
    "accumulated, bf16": {"accumulate_grad_batches": 2, "precision": "bf16-mixed"},
    "64": {"precision": "64-true"},
    "scaled": {"plugins": True},
}
# Each rule and each precision once.
PAIRS = list(zip(RULES, PRECISIONS, strict=True))


@pytest.mark.parametrize(
    ("rule", "precision"), [*PAIRS, *thorough(*(p for p in itertools.product(RULES, PRECISIONS) if p not in PAIRS))]
)
def test_a_run_ends_with_the_numbers_of_a_group_of_its_own(fit, monkeypatch, rule, precision):
    make, settings = RULES[rule], PRECISIONS[precision]

    def run(*, by_hand):
        torch.manual_seed(5)
        more = dict(settings)
        if more.pop("plugins", None):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            more["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        module = Classifier(make, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=20))
        with monkeypatch.context() as patch:
            if by_hand:
                patch.setattr("cpq_lightning.callbacks.cpq.train_quantizers", group_by_hand)
            fit(module, [quiet(lr_factor=0.5)], max_epochs=4, loaders=unshuffled(), **more)
        return module.state_dict()

    ours, expected = run(by_hand=False), run(by_hand=True)
    for name, value in expected.items():
        assert torch.equal(value, ours[name]), name


def test_clipping_is_of_the_users_parameters_alone(fit):
    norms = []

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            ids = of_quantizers(pl_module)
            held = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None and id(p) not in ids]
            if held:
                norms.append(float(torch.stack(held).norm()))

    fit(Classifier(SGD), [quiet(), Norms()], gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)


def test_an_optimizer_of_nothing_but_quantizers_trains_them_by_its_settings(fit):
    module = Classifier(lambda parameters: SGD([p for p in parameters if p.requires_grad]))
    module.requires_grad_(False)
    trainer = fit(module, [quiet()])
    assert groups(trainer) == [[0]]
    assert all(q.log_scale.any() for _, q in quantizers(module))
    (companion,) = trainer.callbacks[0]._companions
    assert companion.optimizer.param_groups[0]["momentum"] == 0.9


class Halves(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [SGD(part.parameters()) for part in (self.net[:3], self.net[3:])]


def test_a_resumed_run_says_that_it_has_another_optimizer(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit(Classifier(SGD), [quiet(), saver], max_epochs=1, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"expected one of AdamW on .* got one of SGD on .*Resume with"):
        fit(Classifier(), [quiet()], ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match="state of 1 optimizers of quantizers, and this run has 2"):
        fit(Halves(), [quiet()], ckpt_path=tmp_path / "last.ckpt")


# Optimizers that are toggled ------------------------------------------------------------------------------------------


class Adversarial(Classifier):
    """A generator and a discriminator that takes what the generator makes."""

    def __init__(self, order="zero_grad first", toggled=True):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.ModuleDict(
            {
                "g": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)),
                "d": nn.Sequential(convnet(), nn.Linear(4, 1)),
            }
        )
        self.order, self.toggled, self.seen = order, toggled, []

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[part].parameters(), lr=1e-3) for part in "gd"]

    def received(self, part):
        """Gradients of the quantizers and gates of a part: the sum of what is there."""
        grads = [p.grad for _, q in quantizers(self.net[part]) for p in q.parameters()]
        return sum(float(g.abs().sum()) for g in grads if g is not None)

    def phase(self, part, optimizer, loss):
        if self.toggled:
            self.toggle_optimizer(optimizer)
        other = "d" if part == "g" else "g"
        if self.order == "zero_grad first":
            optimizer.zero_grad()
        before = self.received(other)
        self.manual_backward(loss())
        self.seen.append((self.received(part), self.received(other) - before))
        optimizer.step()
        if self.order == "step first":
            optimizer.zero_grad()
        if self.toggled:
            self.untoggle_optimizer(optimizer)

    def judged(self, images, real):
        logits = self.net["d"](images)
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        images = batch[0]
        self.phase("g", g, lambda: self.judged(self.net["g"](images), True))
        self.phase("d", d, lambda: self.judged(images, True) + self.judged(self.net["g"](images), False))

    def validation_step(self, batch, batch_idx):
        self.judged(self.net["g"](batch[0]), True)


@pytest.mark.parametrize(
    ("order", "estimator"),
    [
        ("zero_grad first", "curvature"),
        ("step first", "concrete"),
        *thorough(("zero_grad first", "concrete"), ("step first", "curvature")),
    ],
)
def test_who_is_toggled_off_receives_no_gradient_for_quantizers_and_gates(fit, order, estimator):
    config = CPQConfig(
        weight_bits=8, act_bits=8, min_bits=2, learn_bits=True, first_last_bits=None, gate_estimator=estimator
    )
    module = Adversarial(order)
    fit(module, [CPQCallback(config, table=False), BitBudget(5.0, freeze=0.6)], max_epochs=4, limit_val_batches=0)
    assert all(own > 0 and others == 0 for own, others in module.seen)
    # A step that is fitted anew behind the last update begins at 0; its noise stays.
    start = Quantizer("weight", config).noise_logit[0].item()
    assert all(q.log_scale.any() or q.noise_logit.ne(start).any() for _, q in quantizers(module))
    assert not any(p._backward_hooks for p in module.parameters())


def test_without_toggling_gradients_accumulate_as_the_users_do(fit):
    module = Adversarial(toggled=False)
    fit(module, [quiet()], max_epochs=1)
    assert module.seen[0][1] > 0


def test_within_a_fit_a_module_can_be_copied_and_saved(fit):
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            copy.deepcopy(pl_module.net)
            torch.save(pl_module.net, io.BytesIO())

    fit(Classifier(SGD), [quiet(), Copies()], max_epochs=1)


# Nothing to train -----------------------------------------------------------------------------------------------------


class Bank(Classifier):
    """Keeps features, and trains nothing by gradient."""

    def __init__(self, optimizer=None, returns=False):
        super().__init__()
        self.optimizer, self.returns, self.features = optimizer, returns, []

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.features.append(self.net(batch[0]))

    def configure_optimizers(self):
        return None if self.optimizer is None else self.optimizer()


@pytest.mark.filterwarnings("ignore:.*(fit will run with no optimizer|returned `None`|had fixed|rough|no gate has).*")
@pytest.mark.parametrize("make", [None, lambda: torch.optim.SGD([{"params": []}], lr=0.1)], ids=["none", "empty"])
def test_a_module_without_an_optimizer_is_calibrated_and_quantized_and_a_warning_says_so(fit, make):
    module = Bank(make)
    more = [ClusterPull(), BatchNormReestimation(batches=2)]
    with pytest.warns(UserWarning, match="No optimizer of Bank holds a parameter") as caught:
        fit(module, [quiet(), *more])
    assert sum("holds a parameter" in str(w.message) for w in caught) == 1
    assert len(module.features) == 8
    assert all(q.active and q.fitted for _, q in quantizers(module))
    assert all(record.used_levels > 1 for record in levels(module))


@pytest.mark.filterwarnings("ignore")
def test_widths_of_a_module_without_an_optimizer_are_decided_all_the_same(fit):
    module = Bank()
    fit(module, [CPQCallback(LEARN, table=False), BitBudget(4.0)], max_epochs=20)
    assert not any(q.learns_bits for _, q in quantizers(module))


@pytest.mark.filterwarnings("ignore")
def test_a_step_without_a_loss_moves_nothing(fit):
    module = Bank(lambda: SGD(module.parameters()))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, [quiet()])
    assert all(torch.equal(value, module.get_parameter(name)) for name, value in before.items())
    assert all(not q.log_scale.any() for _, q in quantizers(module))


@pytest.mark.filterwarnings("ignore")
def test_a_loss_of_some_batches_only_trains_by_these(fit):
    class Some(Classifier):
        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            return loss if batch_idx % 2 else None

    module = Some(SGD)
    fit(module, [quiet()])
    assert all(q.log_scale.any() for _, q in quantizers(module))


def test_an_optimizer_that_never_tells_of_its_steps_is_named(fit):
    class Bare(torch.optim.SGD):
        def step(self, closure=None):
            return None if closure is None else closure()

    # torch then leaves the method as it is.
    Bare.step.hooked = True
    with pytest.warns(UserWarning, match="never been updated: Bare does not run the step hooks") as caught:
        fit(Classifier(partial(Bare, lr=0.01)), [quiet()], max_epochs=8)
    assert sum("step hooks" in str(w.message) for w in caught) == 1
