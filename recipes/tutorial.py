# %% [markdown]
# # From a plain Lightning classifier to a learned 3-bit ONNX file
#
# This tutorial trains an ordinary LightningModule on handwritten digits, quantizes it to 3-bit weights on average with
# 4-bit activations (training decides how many bits each layer gets), and exports it as an ONNX file that is verified
# against the trained model. It takes about a minute on two CPU cores.
#
# Run it as a script, `python recipes/tutorial.py [FOLDER]`, or cell by cell in an editor that supports `# %%` (VS Code,
# PyCharm, Spyder; `jupytext --to notebook recipes/tutorial.py` makes a notebook). It needs
# `pip install -e '.[recipes,onnx]'` in the checkout.

# %%
import sys
from pathlib import Path

import onnxruntime
import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.callbacks import BitBudget, ClusterPull, DistillationCallback
from cpq_lightning.data import DigitsDataModule

FOLDER = Path(sys.argv[1] if len(sys.argv) == 2 and "ipykernel" not in sys.modules else "tutorial")
seed_everything(0)

# %% [markdown]
# ## 1. The classifier
#
# The classifier has no code for quantization, and its code stays unchanged below.


# %%
class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("test_resnet", in_chans=1, num_classes=10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)


digits = DigitsDataModule(batch_size=64, image_size=24)

# %% [markdown]
# ## 2. In full precision
#
# This run gives the accuracy before quantization. (With `CPQCallback(quantize_from=0.4)` both parts are one run. Here
# they are two, as when a trained model exists already.)

# %%
classifier = Classifier()
trainer = Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=FOLDER)
trainer.fit(classifier, digits)
full_precision = float(trainer.callback_metrics["val_acc"])

# %% [markdown]
# ## 3. Quantized, with learned bits
#
# `CPQConfig` sets the widths that a layer may have: 8 to 2 bits for weights, 4 for activations (the first and last
# layer stay at 8). `BitBudget` keeps the average at 3 bits. Halfway through the run the widths are fixed, and the
# network trains on with them. `DistillationCallback` adds a loss towards the network's full-precision copy, and
# `ClusterPull` dampens the weights: it moves them to their grid points as the run ends. The module above still makes
# the optimizer; an auxiliary optimizer, added by the callback, trains the quantizers.

# %%
budget = BitBudget(target=3.0)
trainer = Trainer(
    max_epochs=10,
    accelerator="cpu",
    logger=CSVLogger(FOLDER),
    log_every_n_steps=5,
    callbacks=[
        CPQCallback(CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, act_bits=4), export=["onnx"]),
        ClusterPull(),
        DistillationCallback("self"),
        budget,
    ],
)
trainer.fit(classifier, digits)
quantized = float(trainer.callback_metrics["val_acc"])
run = Path(trainer.log_dir or FOLDER)
print(f"val_acc {full_precision:.4f} in full precision, {quantized:.4f} at 3 bits on average; everything is in {run}")

# %% [markdown]
# ## 4. What training decided
#
# `levels.png` shows the bits of each layer, `weight_histograms.png` the weights before and after training with their
# grid points, and `trajectory.png` the bits over the run. The same folder has `levels.json`, with the bits, levels,
# scale (`step`) and error of every layer. `cpq report` makes the pictures again from it.

# %%
for name in ("levels.png", "weight_histograms.png", "trajectory.png"):
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(run / name))
    print(run / name)

# %% [markdown]
# ## 5. The exported file
#
# Before the file got its final name, it was loaded in ONNX Runtime and compared with the trained model: the integer
# weights exactly, the activations quantizer by quantizer (the table above). It needs neither PyTorch nor this package.

# %%
path = run / "Classifier.onnx"
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
right = count = 0
for images, labels in digits.val_dataloader():
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    right += int((torch.from_numpy(logits).argmax(1) == labels).sum())
    count += len(labels)
print(f"{path}: {path.stat().st_size / 1000:.0f} kB, accuracy {right / count:.4f} on {count} images in ONNX Runtime")
