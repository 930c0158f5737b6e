import pytest
import timm
import torch
from safetensors.torch import save_file

from cpq_lightning import CPQConfig, QuantizedModule, attach, calibrate, load_quantized
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.backbones.create import create_backbone, pretrained_config
from cpq_lightning.export.export import export_model
from tests.marks import thorough


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("cifar_resnet20", 269_722, 40_551_040), ("cifar_vgg7", 12_979_082, 615_917_568)]
)
def test_networks_are_those_of_the_papers(name, parameters, macs):
    network = create_backbone(name).eval()
    assert sum(p.numel() for p in network.parameters()) == parameters
    attach(network, CPQConfig(act_bits=None))
    network(torch.randn(1, 3, 32, 32))
    counted = sum(q.macs for _, q in quantizers(network))
    assert counted == macs
    assert timm.create_model(name, num_classes=7, in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["cifar_resnet20", *thorough("cifar_vgg7")])
def test_they_ship_and_load_by_their_name(name, tmp_path):
    torch.manual_seed(0)
    module = QuantizedModule(name, num_classes=5, quantization=CPQConfig(weight_bits=3, act_bits=3))
    images = torch.randn(16, 3, 32, 32)
    calibrate(module, [images])
    module.eval()
    architecture = module.export_architecture()
    written = export_model(module.model, tmp_path, samples=images, name="net", architecture=architecture)
    assert (load_quantized(written.path)(images) - module(images)).abs().max() < 1e-4
    export_model(module.model, tmp_path, format="onnx", samples=images, name="net")


def weights_of(name, classes, seed=7):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes).state_dict()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "wrapped", "lightning"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_weights_from_a_file(name, kind, tmp_path):
    state = weights_of(name, 5)
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "lightning":
        held = {f"encoder.net.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(3)}
        torch.save({"state_dict": held, "hyper_parameters": {}, "epoch": 3}, path)
    else:
        torch.save({"state_dict": state} if kind == "wrapped" else state, path)
    network = create_backbone(name, pretrained=str(path), num_classes=5)
    assert all(value.equal(state[key]) for key, value in network.state_dict().items())
    for config in (network.pretrained_cfg, network.default_cfg):
        assert config.get("state_dict") is None


def test_a_head_of_another_size_is_left_out_and_starts_anew(tmp_path):
    state = weights_of("test_resnet", 1000)
    torch.save(state, tmp_path / "w.pth")
    network = create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"), num_classes=3)
    assert network.fc.weight.shape[0] == 3
    loaded = network.state_dict()
    assert all(loaded[key].equal(value) for key, value in state.items() if not key.startswith("fc."))


def test_an_encoder_in_a_lightning_checkpoint_with_a_head_of_its_own(tmp_path):
    state = {k: v for k, v in weights_of("test_resnet", 5).items() if not k.startswith("fc.")}
    held = {f"encoder.{key}": value for key, value in state.items()} | {"head.weight": torch.ones(3, 4)}
    torch.save({"state_dict": held}, tmp_path / "w.ckpt")
    for classes in (0, 7):
        network = create_backbone("test_resnet", pretrained=str(tmp_path / "w.ckpt"), num_classes=classes)
        assert all(network.state_dict()[key].equal(value) for key, value in state.items())


def test_a_checkpoint_from_before_quantization_began(tmp_path):
    module = QuantizedModule("test_resnet", num_classes=3)
    for _, quantizer in quantizers(module):
        quantizer.configure(active=False)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "w.ckpt")
    network = create_backbone("test_resnet", pretrained=str(tmp_path / "w.ckpt"), num_classes=3)
    assert network.fc.weight.equal(module.model.fc.weight)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match=r"of 'resnet18' could not be fetched .*pretrained=PATH"):
        create_backbone("resnet18", pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "no timm model. Near matches: .*'resnet18'"),
        ("resnet18.bogus", "no weights with the tag 'bogus', but"),
    ],
)
def test_names_that_are_none(name, message):
    for ask in (create_backbone, pretrained_config):
        with pytest.raises(ValueError, match=message):
            ask(name)


def test_grey_images_take_the_mean_of_the_colours(tmp_path):
    torch.save(weights_of("test_resnet", 4), tmp_path / "w.pth")
    network = create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"), num_classes=4, in_chans=1).eval()
    assert network(torch.randn(1, 1, 32, 32)).shape == (1, 4)


def test_loading_leaves_random_numbers_as_they_were(tmp_path):
    torch.save(weights_of("test_resnet", 4), tmp_path / "w.pth")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"), num_classes=4)
    assert torch.rand(2).equal(expected)


def test_what_does_not_fit_is_refused(tmp_path):
    def refused(content, message, error=ValueError):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(error, match=message):
            create_backbone("test_resnet", pretrained=str(tmp_path / "w.pth"), num_classes=3)

    # Of another network, with a head of another size: timm by itself would go on without a word.
    refused(weights_of("test_vit", 1000), "does not fit 'test_resnet': .* weights are not in the file")
    refused(weights_of("test_efficientnet", 1000), "does not fit 'test_resnet': .*size mismatch for bn1.weight")
    refused({k: v for k, v in weights_of("test_resnet", 9).items() if "layer4" not in k}, "such as 'layer4")
    refused([torch.ones(2)], "holds no tensors by name")
    refused({"a": object}, "cannot be read without unpickling code")
    module = QuantizedModule("test_resnet", num_classes=3)
    refused({"state_dict": module.state_dict()}, "saved of a network that is quantized")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth is no file"):
        create_backbone("test_resnet", pretrained=str(tmp_path / "nothing.pth"))
    (tmp_path / "half.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(ValueError, match="no safetensors file that can be read"):
        create_backbone("test_resnet", pretrained=str(tmp_path / "half.safetensors"))


@pytest.mark.parametrize("size", [0, 20])
def test_a_size_that_cannot_be_halved_three_times_is_refused(size):
    with pytest.raises(ValueError, match=rf"img_size must be a multiple of 8 pixels, got {size}"):
        create_backbone("cifar_vgg7", num_classes=10, img_size=size)
