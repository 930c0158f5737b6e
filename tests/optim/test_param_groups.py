import pytest
import torch
from timm.optim import Lookahead
from torch import nn

from cpq_lightning.optim.param_groups import holds_parameters, largest_group, release


def parameters():
    return [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))]


def test_release_empties_the_list_that_lbfgs_holds():
    weight, _, step = parameters()
    optimizer = torch.optim.LBFGS([weight, step])
    release(optimizer, [step])
    assert [id(p) for p in optimizer._params] == [id(weight)]


def test_named_parameters_stay_named():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(list(model.named_parameters()))
    release(optimizer, [model.weight])
    assert optimizer.param_groups[0]["param_names"] == ["bias"]


@pytest.mark.parametrize("wrap", [lambda o: o, Lookahead], ids=["plain", "Lookahead"])
def test_what_is_released_leaves_no_state_behind(wrap):
    weight, _, step = parameters()
    inner = torch.optim.Adam([weight, step])
    optimizer = wrap(inner)
    for p in (weight, step):
        p.grad = torch.ones_like(p)
    optimizer.step()
    release(optimizer, [step])
    assert [id(p) for p in inner.state] == [id(weight)]
    weight.grad = torch.ones_like(weight)
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_an_optimizer_whose_groups_are_empty_by_release_steps_and_saves(make, how):
    step = nn.Parameter(torch.ones(1))
    optimizer = make([step], lr=0.1, **how)
    assert holds_parameters(optimizer)
    release(optimizer, [step])
    assert not holds_parameters(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)) == 0


def test_the_largest_group_is_the_one_with_the_most_elements():
    small, large = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(50, 50))]
    optimizer = torch.optim.SGD([{"params": small, "lr": 1.0}, {"params": large, "lr": 0.01}], lr=0.1)
    assert largest_group(optimizer)["lr"] == 0.01
