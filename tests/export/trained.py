"""Small timm networks, quickly trained on classes that are easy to tell apart."""

import functools

import timm
import torch
from torch.nn.functional import cross_entropy, interpolate

from cpq_lightning import CPQConfig, attach, calibrate

CLASSES = 4
# Name, arguments, image size, learning rate. None is deep: tracing takes time for each layer.
NETWORKS = {
    "resnet18": ({}, 64, 2e-3),
    "mobilenetv3_small_050": ({}, 64, 4e-3),
    "test_efficientnet": ({"act_layer": "relu6"}, 64, 3e-3),
    "convnext_atto": ({"depths": [1, 1, 2, 1]}, 64, 1e-3),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, 64, 5e-4),
    "test_resnet": ({}, 32, 3e-3),
}


def images(count, size, seed=0, channels=3):
    """Noise over a pattern that its class has."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, channels, 4, 4, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = interpolate(patterns[labels], size=size, mode="bilinear")
    return x + 0.5 * torch.randn(count, channels, size, size, generator=generator), labels


def train(model, size, steps=25, lr=2e-3, channels=3):
    """A few steps of Adam; batch norms then hold the statistics of the trained network."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        x, labels = images(16, size, seed=step, channels=channels)
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()
    with torch.no_grad():
        for step in range(10):
            model(images(16, size, seed=1000 + step, channels=channels)[0])
    return model.eval()


@functools.lru_cache(maxsize=2)
def network(name, config=None, steps=25):
    """A trained network of that name, quantized; shared by tests, which leave it as it is."""
    arguments, size, lr = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **arguments)
    attach(model, CPQConfig() if config is None else CPQConfig(**dict(config)))
    calibrate(model, [images(16, size)[0]])
    return train(model, size, steps, lr)


def architecture(name):
    return {"timm": name, "arguments": {"num_classes": CLASSES, **NETWORKS[name][0]}}


def samples(name, count=16):
    return images(count, NETWORKS[name][1], seed=7)[0]
