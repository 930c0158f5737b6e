"""ResNet-20 and VGG-7 for images of 32 x 32 pixels, registered with timm.

Sources: He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2 (ResNet-20, with
shortcuts of type A); Louizos et al., *Relaxed Quantization for Discretized Neural Networks*, ICLR 2019 (VGG-7:
2x(128C3) - MP2 - 2x(256C3) - MP2 - 2x(512C3) - MP2 - 1024FC).
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import pad

# Mean and standard deviation of CIFAR-10's training images.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

_CFG = {
    "url": "", "num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0,
    "interpolation": "bilinear", "mean": CIFAR_MEAN, "std": CIFAR_STD,
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet20.untrained": {**_CFG, "first_conv": "conv1", "classifier": "fc"},
        "cifar_vgg7.untrained": {**_CFG, "first_conv": "features.0", "classifier": "fc"},
    }
)


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, which fills missing channels with zeros (type A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            x = pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return self.act2(out + x)


class _Classifier(nn.Module):
    """The interface of timm's models: features, then a replaceable head."""

    num_features: int
    num_classes: int
    fc: nn.Module

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(_Classifier):
    """A residual network of ``6 n + 2`` layers, with 16, 32 and 64 channels.

    Args:
        blocks: Blocks per stage, n.
        num_classes: Number of classes; 0 leaves the head out.
        in_chans: Channels of the image.
    """

    def __init__(self, blocks: int = 3, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = self.head_hidden_size = 64
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = _Block(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))


class CifarVGG(_Classifier):
    """Pairs of 3 x 3 convolutions of 128, 256 and 512 channels, each pair followed by pooling, and two linear layers.

    Args:
        num_classes: Number of classes; 0 leaves the head out.
        in_chans: Channels of the image.
        img_size: Pixels per side; a multiple of 8.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: int = 32) -> None:
        super().__init__()
        if img_size < 8 or img_size % 8:
            raise ValueError(f"img_size must be a multiple of 8 pixels, got {img_size}.")
        layers: list[nn.Module] = []
        channels = in_chans
        for width in (128, 256, 512):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = 1024
        hidden = nn.Linear(512 * (img_size // 8) ** 2, 1024, bias=False)
        self.pre_logits = nn.Sequential(nn.Flatten(), hidden, nn.BatchNorm1d(1024), nn.ReLU(inplace=True))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pre_logits(x)
        return x if pre_logits else self.fc(x)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 (He et al., 2016) for 32 x 32 pixels: 0.27 million weights, 41 million multiply-accumulates."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, blocks=3, **kwargs)


@register_model
def cifar_vgg7(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-7 (Louizos et al., 2019) for 32 x 32 pixels: 13 million weights."""
    return build_model_with_cfg(CifarVGG, "cifar_vgg7", pretrained, **kwargs)
