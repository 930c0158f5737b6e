"""The networks of the campaign, for grey images of 28 x 28 pixels that they see at 14 x 14."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """Two 3 x 3 convolutions, and a 1 x 1 convolution around them where the shape changes (He et al., 2016, type B)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
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
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """Three blocks of 16, 32 and 64 channels behind a convolution of stride 2: ten layers, from 144 to 36,864 weights.

    The classes of grey images of 28 x 28 pixels, seen at 14 x 14: small enough that hundreds of runs fit into an
    afternoon on two cores, and with so little to spare that a missing bit shows.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _Block(16, 16), _Block(16, 32), _Block(32, 64)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images)))
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


NETWORKS: dict[str, type[SmallResNet | SmallSeparable]] = {"resnet": SmallResNet, "separable": SmallSeparable}
