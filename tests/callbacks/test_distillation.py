import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule
from cpq_lightning.attach.layers import is_attached, quantizers
from cpq_lightning.callbacks import BatchNormReestimation, BitBudget, DistillationCallback
from cpq_lightning.functional.distill import distillation_loss
from cpq_lightning.trainer.teacher import loaded_teacher
from tests.marks import thorough
from tests.models import IMAGES, Classifier, convnet, data, run_of


class Forward(Classifier):
    """Calls itself in its step."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return {"loss": cross_entropy(self(images), labels), "extra": 1}


class Losses(pl.Callback):
    """Notes the loss that is backpropagated, and copies of the module before each step."""

    def __init__(self):
        self.losses, self.modules = [], []

    def on_before_backward(self, trainer, module, loss):
        self.losses.append(float(loss.detach()))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.modules.append(copy.deepcopy(module.net))


def test_the_loss_is_the_weighted_sum(fit):
    torch.manual_seed(1)
    teacher = convnet()
    taught, plain = Losses(), Losses()
    callbacks = [CPQCallback(table=False), DistillationCallback(teacher, weight=0.25, temperature=2.0)]
    torch.manual_seed(0)
    module = Classifier()
    start = copy.deepcopy(module)
    loaders = (data(shuffle=False), None)
    fit(module, [*callbacks, taught], max_epochs=1, limit_train_batches=1, loaders=loaders)
    fit(start, [CPQCallback(table=False), plain], max_epochs=1, limit_train_batches=1, loaders=loaders)
    # Before the first step both are the same network.
    student = plain.modules[0].train()
    images = IMAGES[:16]
    distance = distillation_loss(student(images), teacher.eval()(images), temperature=2.0)
    assert taught.losses[0] == pytest.approx(0.75 * plain.losses[0] + 0.25 * distance.item(), rel=1e-5)


@pytest.mark.parametrize("module", [Classifier, Forward])
@pytest.mark.parametrize("after", [True, False])
def test_self_is_the_network_when_quantization_begins(fit, tmp_path, module, after):
    """Whatever the order of the callbacks; until then the loss is the module's own."""
    losses = Losses()
    callbacks = [CPQCallback(CPQConfig(weight_bits=2), quantize_from=4, table=False), DistillationCallback()]
    fit(module(), [losses, *(callbacks if after else callbacks[::-1])], max_epochs=2)
    teacher = torch.load(run_of(tmp_path) / "teacher.pt", weights_only=True)["state_dict"]
    then = losses.modules[4].state_dict()
    assert len(teacher) == len(convnet().state_dict())
    # Of the fifth batch: batch norms have seen four.
    assert all(value.equal(then[key]) for key, value in teacher.items())


def test_the_teacher_is_in_no_checkpoint_and_counts_no_parameter(fit, tmp_path):
    def run(*more):
        torch.manual_seed(0)
        module = Classifier()
        trainer = fit(module, [CPQCallback(table=False), *more], max_epochs=1)
        trainer.save_checkpoint(tmp_path / "m.ckpt")
        return module, torch.load(tmp_path / "m.ckpt", weights_only=True)

    plain, without = run()
    taught, with_teacher = run(DistillationCallback(convnet()))
    assert with_teacher["state_dict"].keys() == without["state_dict"].keys()
    assert len(list(taught.parameters())) == len(list(plain.parameters()))
    assert sum(m is not None for m in taught.modules()) == sum(m is not None for m in plain.modules())
    # Nothing of it is left behind either.
    assert "training_step" not in taught.__dict__
    assert not taught.net._forward_hooks


def test_a_resumed_run_ends_as_the_uninterrupted_one(fit, tmp_path):
    def callbacks():
        return [CPQCallback(CPQConfig(weight_bits=3), quantize_from=4, table=False), DistillationCallback()]

    loaders = (data(shuffle=False), None)
    torch.manual_seed(0)
    whole = Classifier()
    fit(whole, callbacks(), max_epochs=4, loaders=loaders, default_root_dir=tmp_path / "whole")
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path / "half" / "checkpoints", save_last=True)
    half = {"default_root_dir": tmp_path / "half", "enable_checkpointing": True}
    fit(Classifier(), [*callbacks(), keep], max_epochs=2, loaders=loaders, **half)
    # The run may be moved, with its teacher, and another one take its place.
    (tmp_path / "half").rename(tmp_path / "moved")
    torch.manual_seed(9)
    fit(Classifier(), callbacks(), max_epochs=2, loaders=loaders, default_root_dir=tmp_path / "half")
    torch.manual_seed(5)
    resumed = Classifier()
    moved = {"default_root_dir": tmp_path / "rest", "ckpt_path": tmp_path / "moved" / "checkpoints" / "last.ckpt"}
    fit(resumed, callbacks(), max_epochs=4, loaders=loaders, **moved)
    expected = whole.state_dict()
    assert all(value.equal(expected[key]) for key, value in resumed.state_dict().items())
    # The resumed run has a teacher of its own: the one before may go.
    assert (run_of(tmp_path / "rest") / "teacher.pt").exists()
    (run_of(tmp_path / "moved") / "teacher.pt").unlink()
    with pytest.raises(MisconfigurationException, match=r"the file of the copy is neither next to .*last\.ckpt nor at"):
        fit(Classifier(), callbacks(), max_epochs=4, loaders=loaders, **moved)


def test_a_run_that_kept_no_copy_cannot_begin_to_learn_from_itself(fit, tmp_path):
    fit(Classifier(), [CPQCallback(table=False)], max_epochs=1).save_checkpoint(tmp_path / "m.ckpt")
    with pytest.raises(MisconfigurationException, match="kept no copy of it: give a checkpoint as teacher"):
        fit(Classifier(), [CPQCallback(table=False), DistillationCallback()], ckpt_path=tmp_path / "m.ckpt")


def test_a_trainer_that_goes_on_keeps_the_teacher(fit, tmp_path):
    module = Classifier()
    trainer = fit(module, [CPQCallback(quantize_from=2, table=False), DistillationCallback()], max_epochs=1)
    before = torch.load(run_of(tmp_path) / "teacher.pt", weights_only=True)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert "cpq/distillation" in trainer.callback_metrics
    after = torch.load(run_of(tmp_path) / "teacher.pt", weights_only=True)
    assert after["mark"] == before["mark"]
    assert all(value.equal(before["state_dict"][key]) for key, value in after["state_dict"].items())


def test_learned_widths(fit):
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)
    module = Forward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(module, [CPQCallback(config, table=False), BitBudget(4.0), DistillationCallback()], max_epochs=4)
    assert abs(float(trainer.callback_metrics["cpq/weight_bits"]) - 4) <= 0.05
    assert float(trainer.callback_metrics["cpq/distillation"]) > 0
    assert all(torch.isfinite(q.scale()).all() for _, q in quantizers(module))


def test_in_company(fit):
    """An average, statistics estimated anew, accumulated and clipped gradients, and bfloat16."""
    callbacks = [CPQCallback(table=False), EMAWeightAveraging(), DistillationCallback(), BatchNormReestimation()]
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    assert fit(Classifier(), callbacks, **settings).state.finished
    trainer = fit(Classifier(), [CPQCallback(table=False), DistillationCallback(convnet())], precision="bf16-true")
    assert float(trainer.callback_metrics["cpq/distillation"]) > 0


@pytest.mark.parametrize(
    ("whole", "backend"), [(True, "aot_eager"), *thorough((False, "inductor"), (True, "inductor"))]
)
def test_compiled(fit, whole, backend):
    module = Forward()
    if whole:
        module = torch.compile(module, backend=backend)
    else:
        module.net = torch.compile(module.net, backend=backend)
    trainer = fit(module, [CPQCallback(table=False), DistillationCallback()], max_epochs=1)
    assert 0 < float(trainer.callback_metrics["cpq/distillation"]) < 10


@pytest.mark.xdist_group("ddp")
def test_two_processes(fit, tmp_path):
    callbacks = [CPQCallback(CPQConfig(weight_bits=2), quantize_from=1, table=False), DistillationCallback()]
    trainer = fit(Forward(), callbacks, strategy="ddp_fork", devices=2, loaders=(data(8), None))
    assert float(trainer.callback_metrics["cpq/distillation"]) > 0
    assert (run_of(tmp_path) / "teacher.pt").exists()


class Heads(pl.LightningModule):
    """Layers without a common part, and outputs of its own kind."""

    def __init__(self, outputs=lambda logits: logits):
        super().__init__()
        self.body, self.head, self.outputs = nn.Linear(192, 16), nn.Linear(16, 4), outputs

    def forward(self, x):
        return self.outputs(self.head(self.body(x.flatten(1)).relu()))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return cross_entropy(logits["logits"] if isinstance(logits, dict) else logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("outputs", [lambda logits: logits, lambda logits: {"logits": logits}])
def test_a_module_that_is_its_own_network(fit, outputs):
    trainer = fit(Heads(outputs), [CPQCallback(table=False), DistillationCallback()], loaders=(data(), None))
    assert "cpq/distillation" in trainer.callback_metrics


class Looking(Classifier):
    """Looks at another view first, without gradients."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net(batch[0].flip(-1))
        return super().training_step(batch, batch_idx)


def test_calls_without_gradients_do_not_count(fit):
    teacher, seen = convnet(), []
    teacher.register_forward_hook(lambda network, args, output: seen.append(args[0]))
    loaders = (data(shuffle=False), None)
    fit(Looking(), [CPQCallback(table=False), DistillationCallback(teacher)], max_epochs=1, loaders=loaders)
    assert len(seen) == 4
    assert seen[0].equal(IMAGES[:16])


def test_a_teacher_keeps_its_type_under_mixed_precision(fit):
    class Behind(Heads):
        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    teacher = nn.Linear(16, 4)
    callbacks = [CPQCallback(table=False), DistillationCallback(teacher, module="head")]
    fit(Behind(), callbacks, precision="bf16-mixed", max_epochs=1, loaders=(data(), None))
    assert teacher.weight.dtype == torch.float32


class OwnWay(Classifier):
    """Never calls its network as a whole."""

    def training_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.net:
            x = layer(x)
        return cross_entropy(x, batch[1])


SEVEN = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (OwnWay, lambda: DistillationCallback(), "training_step never called Sequential.*module="),
        (Manual, lambda: DistillationCallback(), "which manual optimization does not use"),
        (Classifier, lambda: DistillationCallback(module="nett"), "module='nett' is no part of Classifier.*'net'"),
        (Classifier, lambda: DistillationCallback(SEVEN), r"\(16, 7\) and the network's \(16, 4\)"),
        (Classifier, lambda: DistillationCallback(nn.Linear(3, 3)), "The teacher, a Linear, cannot be called with"),
        (Classifier, lambda: DistillationCallback("resnet81"), "neither 'self', nor the name of a timm model"),
        (Classifier, lambda: DistillationCallback("gone/best.ckpt"), "best.ckpt is not a file"),
    ],
)  # fmt: skip
def test_what_cannot_teach_is_refused(fit, module, callback, message):
    made = module()
    with pytest.raises(MisconfigurationException, match=message):
        fit(made, [CPQCallback(table=False), callback()], max_epochs=1)
    assert "training_step" not in made.__dict__


def test_a_part_of_the_module_itself_cannot_teach(fit):
    module = Classifier()
    with pytest.raises(MisconfigurationException, match="is a part of the module that trains"):
        fit(module, [CPQCallback(table=False), DistillationCallback(module.net)], max_epochs=1)
    assert all(p.requires_grad for p in module.net.parameters())


def test_self_needs_a_network_that_is_quantized(fit):
    with pytest.raises(MisconfigurationException, match="nothing quantizes it"):
        fit(Classifier(), [DistillationCallback()], max_epochs=1)
    assert fit(Classifier(), [DistillationCallback(convnet())], max_epochs=1).state.finished


def test_a_teacher_that_knows_nothing_is_named(fit):
    """A head that has just been made gives all classes the same."""
    untrained = convnet()
    with torch.no_grad():
        untrained[-1].weight.mul_(0.01)
        untrained[-1].bias.zero_()
    with pytest.warns(UserWarning, match="predicts all 4 classes with almost equal probability"):
        fit(Classifier(), [CPQCallback(table=False), DistillationCallback(untrained)], max_epochs=1)


@pytest.mark.parametrize(("name", "value"), [("weight", 0), ("weight", 1.5), ("temperature", 0), ("teacher", "")])
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        DistillationCallback(**{name: value})
    if name != "teacher":
        with pytest.raises(ValueError, match=name):
            QuantizedModule("test_resnet", **{f"distillation_{name}": value})


def test_teachers_from_files(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    for quantization in (None, CPQConfig(weight_bits=3, act_bits=None)):
        torch.manual_seed(1)
        saved = QuantizedModule("test_resnet", num_classes=4, quantization=quantization).eval()
        # As Lightning saves it: plain values.
        checkpoint = {"state_dict": saved.state_dict(), "hyper_parameters": dict(saved.hparams)}
        torch.save(checkpoint, tmp_path / "m.ckpt")
        teacher = loaded_teacher(str(tmp_path / "m.ckpt"), convnet())
        assert is_attached(teacher.network) == (quantization is not None)
        assert teacher(x).equal(saved(x))
        assert not any(p.requires_grad for p in teacher.network.parameters())
    # Weights alone, of a network like the one that trains, under whatever name it has.
    net = convnet().eval()
    torch.save({"state_dict": {f"inner.net.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.ckpt")
    assert loaded_teacher(str(tmp_path / "w.ckpt"), convnet())(x[..., :8, :8]).equal(net(x[..., :8, :8]))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.ckpt")
    with pytest.raises(MisconfigurationException, match="not contain weights for the architecture of the trained Seq"):
        loaded_teacher(str(tmp_path / "w.ckpt"), convnet())


def test_quantized_module_takes_a_teacher(fit, tmp_path):
    torch.manual_seed(1)
    teacher = QuantizedModule("test_efficientnet", num_classes=4, quantization=None)
    torch.save({"state_dict": teacher.state_dict(), "hyper_parameters": dict(teacher.hparams)}, tmp_path / "t.ckpt")
    module = QuantizedModule("test_efficientnet", num_classes=4, teacher=str(tmp_path / "t.ckpt"))
    trainer = fit(module, [CPQCallback(table=False)], max_epochs=1)
    assert float(trainer.callback_metrics["cpq/distillation"]) > 0
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    (tmp_path / "t.ckpt").unlink()
    # The teacher is asked for again where training goes on, and not before.
    assert QuantizedModule.load_from_checkpoint(tmp_path / "m.ckpt").hparams["teacher"] == str(tmp_path / "t.ckpt")
    own = DistillationCallback("self", weight=0.1)
    trainer = fit(module, [CPQCallback(table=False), own], max_epochs=1)
    assert [c for c in trainer.callbacks if isinstance(c, DistillationCallback)] == [own]
    with pytest.raises(ValueError, match="teacher='self' is for a network that is quantized"):
        QuantizedModule("test_efficientnet", quantization=None, teacher="self")
