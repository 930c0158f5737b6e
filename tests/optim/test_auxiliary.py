import copy
import io
import pickle
from functools import partial

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim import lr_scheduler

from cpq_lightning.optim.auxiliary import AuxiliaryOptimizer
from cpq_lightning.optim.update_clamp import UpdateClamp
from tests.marks import TORCH, thorough


def setup(make=lambda p: torch.optim.SGD(p, lr=0.01), **settings):
    weight, step = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(1))
    optimizer = make([weight])
    return weight, step, optimizer, AuxiliaryOptimizer(optimizer, [step], **settings)


def backward(weight, step, factor=1.0):
    loss = factor * ((weight.sum() - 1) ** 2 + (step.sum() - 1) ** 2)
    loss.backward()
    return loss


# Of the user's settings ----------------------------------------------------------------------------------------------

FACTOR = 0.5


class ScheduleFree(torch.optim.Optimizer):
    """As schedulefree.SGDScheduleFree: what it counts lies in its groups, and it trains at other values than it is
    evaluated at.
    """

    def __init__(self, params, lr=1.0, momentum=0.9, weight_decay=0.0):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "train_mode": False, "k": 0, "sum": 0.0},
        )

    @torch.no_grad()
    def _switch(self, mode, weight):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["momentum"]))
                group["train_mode"] = mode

    def eval(self):
        self._switch(False, lambda momentum: 1 - 1 / momentum)

    def train(self):
        self._switch(True, lambda momentum: 1 - momentum)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() before step()")
            group["sum"] += group["lr"] ** 2
            part = group["lr"] ** 2 / group["sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                grad = p.grad + group["weight_decay"] * p
                p.lerp_(z, part)
                p.add_(grad, alpha=group["lr"] * (group["momentum"] * (1 - part) - 1))
                z.sub_(grad, alpha=group["lr"])
            group["k"] += 1
        return loss


def schedule_free(params, **settings):
    optimizer = ScheduleFree(params, **settings)
    optimizer.train()
    return optimizer


class Passing(torch.optim.AdamW):
    """Hands on what its constructor is given."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW, one by one": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=False),
    "AdamW, a tensor as rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adam, amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True, maximize=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "a subclass": partial(Passing, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "schedule-free": partial(schedule_free, lr=0.1, weight_decay=0.1),
    "timm's Lion": partial(timm.optim.Lion, lr=0.01, weight_decay=0.1),
    "timm's LARS": partial(timm.optim.Lars, lr=0.1, momentum=0.9, weight_decay=0.1),
    "timm's LAMB": partial(timm.optim.Lamb, lr=0.01, weight_decay=0.1, max_grad_norm=None),
    **{
        f"timm's {cls.__name__}": partial(cls, lr=0.01, weight_decay=0.1)
        for cls in (timm.optim.Adan, timm.optim.NAdamW, timm.optim.RMSpropTF, timm.optim.MADGRAD, timm.optim.AdaBelief)
    },
}
SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "by hand": None,
}


def trained(make, with_companion, schedule=None, steps=10):
    """What parameters and their states are behind some steps; without a companion in a group of their own, which is
    set by hand.
    """
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
    own = [nn.Parameter(torch.randn(size)) for size in (1, 3, 1)]
    optimizer = make([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}])
    scheduler = None if schedule is None else schedule(optimizer)
    if with_companion:
        trainer = AuxiliaryOptimizer(optimizer, own, FACTOR).optimizer
    else:
        optimizer.add_param_group({**optimizer.param_groups[0], "params": own, "weight_decay": 0.0})
        UpdateClamp(optimizer, own)
        trainer = optimizer
    for index in range(steps):
        optimizer.zero_grad()
        for p in (*weights, *own):
            p.grad = torch.randn_like(p)
        large = optimizer.param_groups[0]
        if not with_companion:
            own_keys = ("params", "weight_decay", "k", "sum", "step")
            settings = {k: v for k, v in large.items() if k not in own_keys}
            optimizer.param_groups[-1].update(settings | {"lr": large["lr"] * FACTOR})
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        elif index == 5:
            large["lr"] = large["lr"] * 0.5
            if isinstance(large.get("eps"), float):
                large["eps"] = 1e-3
    return (*weights, *own), [trainer.state[p] for p in own], optimizer


@pytest.mark.parametrize("schedule", [*SCHEDULERS])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_the_numbers_are_those_of_a_group_of_its_own_in_the_users_optimizer(name, schedule):
    make, schedule = OPTIMIZERS[name], SCHEDULERS[schedule]
    if name == "Adagrad" and TORCH < (2, 9):
        pytest.skip("Adagrad of torch 2.8 takes no group later")
    if schedule is not None and not {"betas", "momentum"} & make([nn.Parameter(torch.ones(1))]).defaults.keys():
        schedule = partial(lr_scheduler.ExponentialLR, gamma=0.8)
    values, states, optimizer = trained(make, True, schedule)
    expected, expected_states, _ = trained(make, False, schedule)
    for one, other in zip(values, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(states, expected_states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one if one[k] is not None)
    assert len(optimizer.param_groups) == 2
    assert len(optimizer.state_dict()["state"]) == 2


def test_settings_of_the_largest_group_are_followed_at_each_step():
    weight, step, optimizer, companion = setup(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3), lr_factor=3.0)
    (group,) = companion.optimizer.param_groups
    assert type(companion.optimizer) is torch.optim.AdamW
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.3), 0.0)
    larger = nn.Parameter(torch.ones(9, 9))
    optimizer.add_param_group({"params": [larger], "lr": 0.01, "betas": (0.5, 0.6), "name": "backbone"})
    backward(weight, step)
    optimizer.step()
    assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(0.03), (0.5, 0.6), 0.0)
    assert "name" not in group


@pytest.mark.parametrize("keyword", [False, True])
def test_what_a_closure_sets_counts_in_its_step(keyword):
    weight, step, optimizer, _ = setup()

    def closure():
        optimizer.param_groups[0]["lr"] = 0.02
        return backward(weight, step)

    result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert result.item() == 10
    torch.testing.assert_close(step.detach(), torch.tensor([0.04]))


# Classes that cannot be had so ---------------------------------------------------------------------------------------


class MuonAndAdam(torch.optim.Optimizer):
    """Takes any parameter, and fails in its step on one that is no matrix."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim == 2
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p, lr=0.1),
        pytest.param(
            lambda p: torch.optim.Muon(p, lr=0.1),
            marks=pytest.mark.skipif(TORCH < (2, 9), reason="torch 2.8 has no Muon"),
        ),
        lambda p: MuonAndAdam(p, lr=0.1),
    ],
    ids=["LBFGS", "Muon", "fails in its step"],
)
def test_one_that_takes_no_such_parameters_gets_adam_whose_rate_follows_in_proportion(make):
    weight, step, optimizer, companion = setup(make, lr_factor=2.0)
    assert not companion.has_users_class
    assert type(companion.optimizer) is torch.optim.Adam
    optimizer.param_groups[0]["lr"] = 0.05

    def closure():
        optimizer.zero_grad()
        return backward(weight, step)

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    assert companion.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    torch.testing.assert_close(step.detach(), torch.tensor([1e-3]))


def test_closures_that_are_evaluated_often_do_not_pile_up_gradients():
    weight, step, optimizer, _ = setup(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5))
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = backward(weight, step)
        seen.append(step.grad.item())
        return loss

    optimizer.step(closure)
    assert len(seen) > 1
    assert len(set(seen)) == 1
    assert step.item() != 0


class Sam(torch.optim.Optimizer):
    """As it is published: a step up, and a step of another optimizer from there."""

    def __init__(self, params, base_optimizer, rho=0.05, **settings):
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base_optimizer(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=group["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("whole", [False, True])
def test_a_wrapper_that_steps_twice_trains_once_by_the_second_gradient(whole):
    weight, step, optimizer, companion = setup(lambda p: Sam(p, torch.optim.SGD, lr=0.01, momentum=0.5))
    assert type(companion.optimizer) is torch.optim.SGD
    assert companion.optimizer.param_groups[0]["momentum"] == 0.5
    if whole:
        optimizer.step(lambda: backward(weight, step))
    else:
        backward(weight, step)
        optimizer.first_step()
        assert step.grad is None
        backward(weight, step)
        optimizer.second_step()
    torch.testing.assert_close(step.detach(), torch.tensor([0.02]))
    assert step.grad is None


def test_a_wrapper_without_hooks_of_its_own_trains_with_the_optimizer_inside():
    weight, step, optimizer, companion = setup(lambda p: timm.optim.Lookahead(torch.optim.SGD(p, lr=0.01)))
    assert type(companion.optimizer) is torch.optim.SGD
    for expected in (0.02, 0.0396):
        optimizer.zero_grad()
        backward(weight, step)
        optimizer.step()
        torch.testing.assert_close(step.detach(), torch.tensor([expected]))


# In its rhythm -------------------------------------------------------------------------------------------------------


def test_steps_with_the_users_optimizer():
    weight, step, optimizer, _ = setup()
    backward(weight, step)
    optimizer.step()
    torch.testing.assert_close(step.detach(), torch.tensor([0.02]))
    optimizer.zero_grad()
    assert step.grad is None


def test_gradients_are_accumulated_as_the_users_are():
    weight, step, optimizer, _ = setup()
    for _ in range(2):
        backward(weight, step, 0.5)
    optimizer.step()
    torch.testing.assert_close(step.detach(), torch.tensor([0.02]))


def test_training_and_evaluation_of_an_optimizer_without_a_schedule_are_followed():
    weight, step, optimizer, companion = setup(lambda p: schedule_free(p, lr=0.01))
    for _ in range(3):
        optimizer.zero_grad()
        backward(weight, step)
        optimizer.step()
    at_training = step.item()
    optimizer.eval()
    assert step.item() != at_training
    optimizer.eval()
    assert not companion.optimizer.param_groups[0]["train_mode"]
    optimizer.train()
    assert step.item() == pytest.approx(at_training)
    backward(weight, step)
    optimizer.step()


def test_scaled_gradients_are_unscaled():
    moved = []
    for scale in (1.0, 1024.0):
        weight, step, optimizer, _ = setup(grad_scale=lambda scale=scale: scale)
        backward(weight, step, factor=scale)
        optimizer.step()
        moved.append(step.item())
    assert moved[0] == moved[1] != 0


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_moves_nothing(scaled):
    weight, step, optimizer, _ = setup(**({"grad_scale": lambda: 1.0} if scaled else {}))
    for value in (float("nan"), float("inf"), -float("inf")):
        backward(weight, step)
        step.grad.fill_(value)
        optimizer.step()
        assert step.item() == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_moves_nothing(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight, step, optimizer, _ = setup(
        lambda p: torch.optim.SGD(p, lr=0.01, fused=fused), grad_scale=lambda: scaler.get_scale()
    )
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale((weight.sum() - 1) ** 2 + (step.sum() - 1) ** 2).backward()
        if overflow:
            weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert step.item() == pytest.approx(0.0 if overflow else 0.02)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_nothing_is_read_back_from_the_device(how, monkeypatch):
    weight, step, optimizer, _ = setup(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, **how))
    backward(weight, step)

    def read(*_):
        raise AssertionError("a value is read")

    for name in ("item", "__bool__", "__float__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, read)
    optimizer.step()
    monkeypatch.undo()
    assert step.item() != 0


# Optimizers that are toggled ------------------------------------------------------------------------------------------


def test_while_the_users_parameters_are_toggled_off_no_gradient_is_received():
    weight, step, _, companion = setup()
    weight.requires_grad_(False)
    backward(weight, step)
    assert not step.grad
    weight.requires_grad_(True)
    backward(weight, step)
    assert step.grad.item() == -2
    companion.remove()
    weight.requires_grad_(False)
    backward(weight, step)
    assert step.grad.item() == -4


def test_beside_parameters_that_are_all_frozen_the_quantizers_train():
    weight, step = nn.Parameter(torch.ones(2, 2), requires_grad=False), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    AuxiliaryOptimizer(optimizer, [step])
    backward(weight, step)
    optimizer.step()
    assert step.item() != 0


def test_a_quantizer_that_is_frozen_yet_is_toggled_with_the_others_later():
    weight, step = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(1), requires_grad=False)
    AuxiliaryOptimizer(torch.optim.SGD([weight], lr=0.01), [step])
    assert not step.requires_grad
    step.requires_grad_(True)
    weight.requires_grad_(False)
    backward(weight, step)
    assert not step.grad


def test_copies_of_a_module_are_not_toggled():
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([module.weight], lr=0.01)
    AuxiliaryOptimizer(optimizer, [module.bias])
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ]
    module.weight.requires_grad_(False)
    for one in copies:
        one(torch.ones(1, 2)).sum().backward()
        assert one.bias.grad.item() == 1
    module(torch.ones(1, 2)).sum().backward()
    assert not module.bias.grad


@pytest.mark.parametrize("backend", ["aot_eager", *thorough("inductor")])
def test_compiled_code_is_toggled_too(backend):
    torch._dynamo.reset()
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([module.weight], lr=0.01)
    AuxiliaryOptimizer(optimizer, [module.bias])
    compiled = torch.compile(module, backend=backend)
    for on in (True, False, True):
        module.weight.requires_grad_(on)
        module.bias.grad = None
        compiled(torch.ones(1, 2)).sum().backward()
        assert bool(module.bias.grad) is on


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_toggled_too(reentrant):
    module = nn.Linear(2, 1)
    AuxiliaryOptimizer(torch.optim.SGD([module.weight], lr=0.01), [module.bias])
    module.weight.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert not module.bias.grad


# What stays outside --------------------------------------------------------------------------------------------------


def test_a_group_that_is_added_later_comes_without_them():
    _, step, optimizer, companion = setup()
    other = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [step, other]})
    optimizer.add_param_group({"params": [step]})
    optimizer.add_param_group({"params": step})
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups[1:]] == [[id(other)]]
    companion.remove()
    optimizer.add_param_group({"params": [step]})
    assert len(optimizer.param_groups) == 3


def test_removed_it_leaves_the_optimizer_as_it_was():
    weight, step, optimizer, companion = setup(lambda p: schedule_free(p, lr=0.01))
    companion.remove()
    backward(weight, step)
    optimizer.step()
    optimizer.zero_grad()
    assert step.item() == 0
    assert step.grad is not None
    assert not step._backward_hooks
    assert not {"zero_grad", "add_param_group", "train", "eval"} & vars(optimizer).keys()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# State ---------------------------------------------------------------------------------------------------------------


def test_a_state_of_another_class_or_of_other_parameters_is_refused():
    _, _, _, companion = setup()
    _, _, _, other = setup(lambda p: torch.optim.AdamW(p, lr=0.01))
    with pytest.raises(ValueError, match=r"expected one of SGD on 1 parameters, got one of AdamW on 1.*Resume with"):
        companion.load_state_dict(other.state_dict())
    more = AuxiliaryOptimizer(
        torch.optim.SGD([nn.Parameter(torch.ones(1))]), [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    )
    with pytest.raises(ValueError, match="got one of SGD on 3 parameters"):
        companion.load_state_dict(more.state_dict())
    companion.load_state_dict(companion.state_dict())
