from functools import partial

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import lr_scheduler as S

from cpq_lightning.optim import adopt, release, takes_quantizers
from cpq_lightning.optim.groups import GROUP_NAME

FACTOR = 3.0


def parameters():
    return [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))]


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "Adam, amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "RAdam": partial(torch.optim.RAdam, lr=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.1),
    "Rprop": partial(torch.optim.Rprop, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quantizers_get_a_group_of_their_own(name):
    weight, bias, step = parameters()
    optimizer = OPTIMIZERS[name]([weight, bias, step])
    assert takes_quantizers(optimizer)
    group = adopt(optimizer, [step], [], FACTOR)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(weight), id(bias)], [id(step)]]
    assert group["lr"] == pytest.approx(0.1 * FACTOR)
    assert group.get("weight_decay", 0.0) == 0.0
    assert group["name"] == GROUP_NAME
    stepped(optimizer)
    assert step.item() != 1
    other = OPTIMIZERS[name](parameters()[:2])
    adopt(other, parameters()[2:], [], FACTOR)
    other.load_state_dict(optimizer.state_dict())


def test_named_parameters_stay_named():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(list(model.named_parameters()))
    adopt(optimizer, [nn.Parameter(torch.ones(1))], [], 1.0)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert len(optimizer.param_groups[1]["param_names"]) == 1


def test_settings_come_from_the_largest_group():
    small, large = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(50, 50))
    optimizer = torch.optim.SGD([{"params": [small], "lr": 1.0}, {"params": [large], "lr": 0.01, "momentum": 0.5}])
    group = adopt(optimizer, [nn.Parameter(torch.ones(1))], [], FACTOR)
    assert (group["lr"], group["momentum"]) == (pytest.approx(0.01 * FACTOR), 0.5)


@pytest.mark.parametrize(
    ("optimizer", "accepts"),
    [
        (lambda p: torch.optim.LBFGS(p), False),
        (lambda p: torch.optim.Muon(p[:1]), False),
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), capturable=False, foreach=False), True),
    ],
)
def test_what_takes_a_group_of_one_dimensional_parameters(optimizer, accepts):
    assert takes_quantizers(optimizer(parameters())) is accepts


def test_release_empties_the_list_that_lbfgs_holds():
    weight, _, step = parameters()
    optimizer = torch.optim.LBFGS([weight, step])
    release(optimizer, [step])
    assert [id(p) for p in optimizer._params] == [id(weight)]


SCHEDULERS = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda e: 0.9**e),
    "LambdaLR, a list": lambda o: S.LambdaLR(o, [lambda e: 0.9**e]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: S.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: S.LinearLR(o),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o), S.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o), S.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
    "ReduceLROnPlateau, floors": lambda o: S.ReduceLROnPlateau(o, patience=0, min_lr=[0.001]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_schedulers_go_on_and_drive_the_new_group_in_proportion(name):
    def run(with_quantizers):
        optimizer = torch.optim.SGD(parameters()[:2], lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        if with_quantizers:
            adopt(optimizer, parameters()[2:], [scheduler], FACTOR)
        rates = []
        for _ in range(8):
            stepped(optimizer)
            scheduler.step(*([1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else []))
            rates.append([g["lr"] for g in optimizer.param_groups])
        return rates, scheduler, optimizer

    alone, _, _ = run(False)
    together, scheduler, optimizer = run(True)
    assert [r[0] for r in together] == pytest.approx([r[0] for r in alone])
    assert len({r[0] for r in alone}) > 1
    assert [r[1] for r in together] == pytest.approx([FACTOR * r[0] for r in alone])
    _, other, _ = run(True)
    other.load_state_dict(scheduler.state_dict())
    assert len(scheduler.get_last_lr()) == len(optimizer.param_groups)


def test_a_scheduler_of_timm_goes_on_too():
    optimizer = torch.optim.SGD(parameters()[:2], lr=0.1)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    adopt(optimizer, parameters()[2:], [scheduler], FACTOR)
    for epoch in range(5):
        scheduler.step(epoch)
    first, second = (g["lr"] for g in optimizer.param_groups)
    assert first < 0.1
    assert second == pytest.approx(FACTOR * first)


def test_a_scheduler_of_another_optimizer_is_left_alone():
    optimizer, other = torch.optim.SGD(parameters(), lr=0.1), torch.optim.SGD(parameters(), lr=0.1)
    scheduler = S.LambdaLR(other, lambda e: 1.0)
    adopt(optimizer, parameters()[2:], [scheduler], FACTOR)
    assert len(scheduler.lr_lambdas) == 1
