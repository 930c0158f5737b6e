import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule, calibrate, levels
from cpq_lightning.attach.layers import is_attached, quantizers
from tests.models import convnet, data, run_of


def small(**settings):
    return QuantizedModule("test_efficientnet", num_classes=4, **settings)


def test_a_named_backbone_restores_from_its_checkpoint_alone(fit, tmp_path):
    module = small(
        quantization=CPQConfig(weight_bits=3, ignore=["*.conv_pw"], overrides={"*.se.*": {"weight_bits": 8}})
    )
    fit(module, max_epochs=1).save_checkpoint(tmp_path / "m.ckpt")
    restored = QuantizedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    x = torch.randn(4, 3, 8, 8)
    assert restored.eval()(x).equal(module.eval()(x))
    assert levels(restored)[0] == levels(module)[0]


def test_pretrained_weights_are_not_asked_for_again(fit, tmp_path, monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def offline(name, pretrained, **arguments):
        asked.append(pretrained)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    fit(small(pretrained=True), max_epochs=1).save_checkpoint(tmp_path / "m.ckpt")
    QuantizedModule.load_from_checkpoint(tmp_path / "m.ckpt")
    assert asked == [True, False]


def test_an_instance_as_backbone(fit, tmp_path):
    module = QuantizedModule(convnet(), num_classes=4)
    fit(module, max_epochs=1).save_checkpoint(tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="backbone=network"):
        QuantizedModule.load_from_checkpoint(tmp_path / "m.ckpt")
    restored = QuantizedModule.load_from_checkpoint(tmp_path / "m.ckpt", backbone=convnet())
    x = torch.randn(4, 3, 8, 8)
    assert restored.eval()(x).equal(module.eval()(x))


def test_it_pickles():
    module = calibrate(small(), [torch.randn(4, 3, 8, 8)]).eval()
    x = torch.randn(2, 3, 8, 8)
    assert pickle.loads(pickle.dumps(module))(x).equal(module(x))


def test_without_a_callback_it_calibrates_and_exports(fit, tmp_path):
    module = small()
    trainer = fit(module, max_epochs=1)
    assert [type(c) for c in trainer.callbacks].count(CPQCallback) == 1
    assert (run_of(tmp_path) / "levels.json").exists()


def test_a_callback_of_the_users_own_is_kept(fit):
    callback = CPQCallback(quantize_from=3, table=False)
    trainer = fit(small(), [callback], max_epochs=1)
    assert [c for c in trainer.callbacks if isinstance(c, CPQCallback)] == [callback]


def test_full_precision_on_request(fit, tmp_path):
    module = small(quantization=None)
    fit(module, max_epochs=1)
    assert not is_attached(module)
    assert not (run_of(tmp_path) / "levels.json").exists()


def test_logged_metrics(fit):
    trainer = fit(QuantizedModule("test_efficientnet", num_classes=10), [CPQCallback(table=False)], max_epochs=1)
    assert {"train_loss", "train_acc", "val_loss", "val_acc", "val_acc_top5"} <= set(trainer.callback_metrics)
    trainer = fit(small(), [CPQCallback(table=False)], max_epochs=1)
    assert "val_acc_top5" not in trainer.callback_metrics


def test_accuracy_is_that_of_the_most_probable_class_and_of_the_first_five():
    module = QuantizedModule("test_efficientnet", num_classes=10, quantization=None)
    logits = torch.arange(10.0).flip(0).expand(4, 10)
    labels = torch.tensor([0, 1, 4, 5])
    assert {name: float(value) for name, value in module.val_metrics(logits, labels).items()} == {
        "val_acc": 0.25,
        "val_acc_top5": 0.75,
    }
    assert float(module.train_acc(logits, labels)) == 0.25


def test_validate_test_and_predict_from_a_checkpoint(fit, tmp_path):
    module = small()
    trainer = fit(module, [CPQCallback(table=False)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for run in ("validate", "test"):
        results = getattr(pl.Trainer(**quiet), run)(
            small(), data(shuffle=False), ckpt_path=tmp_path / "m.ckpt", verbose=False
        )
        assert 0 <= results[0][f"{run[:3] if run == 'validate' else run}_acc"] <= 1
    logits = pl.Trainer(**quiet).predict(small(), data(shuffle=False), ckpt_path=tmp_path / "m.ckpt")
    module.eval()
    assert torch.cat(logits).argmax(1).equal(module(next(iter(data(64, shuffle=False)))[0]).argmax(1))


def test_label_smoothing_changes_the_training_loss_only(fit):
    x, y = next(iter(data()))
    module = small(label_smoothing=0.5, quantization=None).eval()
    module.log = lambda *args, **kwargs: None
    plain = nn.functional.cross_entropy(module(x), y)
    smooth = module.training_step((x, y), 0)
    torch.testing.assert_close(smooth, nn.functional.cross_entropy(module(x), y, label_smoothing=0.5))
    assert not torch.isclose(smooth, plain)


def test_plateau_scheduler_gets_a_monitor(fit):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)

    module = small(lr_scheduler=plateau)
    assert fit(module, [CPQCallback(table=False)], max_epochs=1).state.finished
    assert all(torch.isfinite(q.scale()).all() for _, q in quantizers(module))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet81"}, r"'resnet81' is no timm model. Near matches: \['resnet"),
        ({"backbone": "zzzzzz"}, "no timm model"),
        ({"backbone": "resnet18", "num_classes": 0}, "num_classes must be"),
        ({"backbone": "resnet18", "label_smoothing": 2.0}, "label_smoothing must be"),
        ({"backbone": convnet(), "pretrained": True}, "need a backbone's name"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedModule(**arguments)
