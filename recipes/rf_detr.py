# %% [markdown]
# # RF-DETR, trained with 4-bit weights and exported
#
# RF-DETR (`pip install 'rfdetr[train]'`) is a detector whose training is a Lightning project. This script trains it
# quantized, with its own module, data, trainer and callbacks, and writes an ONNX file that is verified against the
# trained network.
#
# It runs as it is, `python recipes/rf_detr.py [FOLDER]`, in some minutes on two CPU cores: with made pictures of 128
# pixels and random weights, which detect nothing after so few steps. For your own detector replace the two settings in
# section 1. It needs `pip install -e '.[published-rfdetr]'` in the checkout.

# %%
import copy
import json
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.training import RFDETRDataModule, RFDETRModelModule, build_trainer
from rich.console import Console

import cpq_lightning
from cpq_lightning import CPQCallback, CPQConfig, attach, coverage, export_model
from cpq_lightning.export.table import export_table

FOLDER = Path(sys.argv[1] if len(sys.argv) == 2 and "ipykernel" not in sys.modules else "rf_detr")
torch.manual_seed(0)

# %% [markdown]
# ## 1. Detector and data
#
# RF-DETR reads a folder with `train/`, `valid/` and `test/`, each with pictures and `_annotations.coco.json`. Here they
# are grey pictures with a red or a blue square.
#
# **For your own data**, give `dataset_dir`, remove the settings of the small example from `model_config`, so that the
# published weights are loaded, and train longer: quantized training is finetuning, and begins from a trained detector.


# %%
def make_pictures(folder: Path, count: int, size: int = 128) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    colours = ("red", "blue")
    images, annotations = [], []
    for index in range(count):
        side, kind = random.randrange(32, 64), random.randrange(2)
        left, top = random.randrange(size - side), random.randrange(size - side)
        picture = Image.new("RGB", (size, size), "grey")
        ImageDraw.Draw(picture).rectangle((left, top, left + side, top + side), fill=colours[kind])
        picture.save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": size, "height": size})
        box = {"bbox": [left, top, side, side], "area": side * side, "iscrowd": 0}
        annotations.append({"id": index, "image_id": index, "category_id": kind + 1, **box})
    categories = [{"id": i + 1, "name": name, "supercategory": "square"} for i, name in enumerate(colours)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


random.seed(0)
for part in ("train", "valid", "test"):
    make_pictures(FOLDER / "pictures" / part, 8)

small = {"resolution": 128, "positional_encoding_size": 8, "num_queries": 50, "num_select": 50, "group_detr": 2}
model_config = RFDETRNanoConfig(num_classes=2, pretrain_weights=None, **small)
train_config = TrainConfig(
    dataset_dir=str(FOLDER / "pictures"), output_dir=str(FOLDER), epochs=1, batch_size=4, num_workers=0,
    multi_scale=False, tensorboard=False, accelerator="cpu", augmentation_backend="torchvision", compute_val_loss=True,
)  # fmt: skip
module = RFDETRModelModule(model_config, train_config)
data = RFDETRDataModule(model_config, train_config)

# %% [markdown]
# ## 2. What is quantized, and to how many bits
#
# - The backbone, a vision transformer, has four fifths of the weights. They get 4 bits, and so do those of the decoder.
# - Inputs of layers and of attention's products get 8 bits: few values of a transformer are far larger than the others,
#   and with 4 bits the others would share a handful of levels.
# - What computes coordinates keeps 8 bits: the heads of boxes and classes, and `sampling_offsets` of the decoder's
#   deformable attention. An error there is a distance in the picture, and they have few weights.
# - The first and last layers have 8 bits by default.
#
# `attention=True` needs one forward to find the products of two activations. RF-DETR's LightningModule has no forward,
# so `attach` gets the network in it, and `CPQCallback` finds it quantized.

# %%
heads = ("*bbox_embed*", "*class_embed*", "*ref_point_head*", "*sampling_offsets")
config = CPQConfig(
    weight_bits=4, act_bits=8, attention=True, overrides={pattern: {"weight_bits": 8} for pattern in heads}
)
pictures = torch.rand(2, 3, model_config.resolution, model_config.resolution)
attach(module.model, config, example_inputs=pictures)

# %% [markdown]
# ## 3. Training
#
# `build_trainer` makes RF-DETR's Trainer with its callbacks. `CPQCallback` has to stand before them, because the
# exponential moving average copies the network when the fit begins, and must copy the quantized one. Weights and scales
# are averaged; bits, grids, and ranges that are fitted again, are taken from the network that trains.
#
# For widths that training chooses, four bits on average, add `BitBudget(4.0)` behind `CPQCallback()`, and give the
# config `weight_bits=8, min_bits=2, learn_bits=True`; for the heads then `{"learn_bits": False}`.

# %%
trainer = build_trainer(train_config, model_config)
trainer.callbacks[:0] = [CPQCallback(config)]
trainer.fit(module, data)

# %% [markdown]
# ## 4. The averaged network is the one that is shipped
#
# RF-DETR validates the averaged network, writes it to `last_ema.pth` and, where its metric was best, to
# `checkpoint_best_total.pth`, and leaves the module with it. The average is of weights in full precision, and its
# forward quantizes it. So the logged metrics are those of the quantized average, which the file holds: here it is read
# into a new module and validated again. Within `cpq_lightning.loading()` a state of a quantized network attaches the
# quantizers that it has. `RFDETRNano.from_checkpoint` works there too; outside of it an error says what to do.

# %%
shipped = RFDETRModelModule(model_config, train_config)
state = torch.load(FOLDER / "last_ema.pth", weights_only=False)["model"]
with cpq_lightning.loading():
    shipped.model.load_state_dict(state)
evaluation = build_trainer(train_config, model_config, include_training_callbacks=False)
(metrics,) = evaluation.validate(shipped, data)
logged = float(trainer.callback_metrics["val/loss"])
print(f"validation loss of the average: {logged:.4f} in the run, {metrics['val/loss']:.4f} from the file")
assert abs(metrics["val/loss"] - logged) < 1e-4 * logged

# %% [markdown]
# ## 5. Export
#
# RF-DETR's `export()` turns a copy of the network into the one that is deployed: it takes a batch of normalized
# pictures, and returns boxes and logits. `export_model` compares the file with the trained network in ONNX Runtime,
# quantizer by quantizer, before the file gets its name. The table names layers that the file lacks: RF-DETR trains
# several groups of queries, and evaluates one.

# %%
samples = torch.stack([data.val_dataloader().dataset[index][0] for index in range(8)])
shipped.model.eval()
print(coverage(shipped.model, example_inputs=samples).sentence())
deployed = copy.deepcopy(shipped.model)
deployed.export()
result = export_model(deployed, FOLDER, format="onnx", samples=samples, name="rf_detr")
Console().print(export_table(result))
