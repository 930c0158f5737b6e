"""Draw the layers of the package from the import contracts: python docs/layers.py"""

import ast
import json
import re
import textwrap
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE, PICTURE = ROOT / "cpq_lightning", ROOT / "docs" / "layers.png"
# Where the picture keeps what it was drawn from.
KEY = "layers"
FILLS = {"Lightning": "#cfe0f3", "no Lightning": "#e9e9e9", "torch alone": "#f6dcc0"}


def read():
    """The rows of the picture, from the top: the ``name``, ``purpose`` and ``knows`` of each layer."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
    forbidden = [c for c in contracts if c["type"] == "forbidden"]
    rows = [re.split(r"\s*[:|]\s*", row) for row in layers]
    return [[{"name": n, "purpose": purpose(n), "knows": knows(n, forbidden)} for n in row] for row in rows]


def purpose(name):
    """What the docstring of a layer says before what it may import."""
    path = PACKAGE / name / "__init__.py"
    docstring = ast.get_docstring(ast.parse((path if path.exists() else PACKAGE / f"{name}.py").read_text()))
    return docstring.split(" May import ")[0].split("\n")[0].replace("``", "").rstrip(".")


def knows(name, forbidden):
    """Which of the three groups a layer belongs to."""
    barred = {m for c in forbidden if f"cpq_lightning.{name}" in c["source_modules"] for m in c["forbidden_modules"]}
    return "torch alone" if "timm" in barred else "no Lightning" if "lightning" in barred else "Lightning"


def draw(rows, path):
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(10, 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(1, 101))
    axes.axis("off")
    left, right, top = 9, 91, 100
    height = [4 if len(row) == 1 else 7 for row in rows]
    gap = (top - 2 - sum(height)) / (len(rows) - 1)
    ends = []
    y = top
    for row, tall in zip(rows, height, strict=True):
        y -= tall
        width = (right - left - 2.5 * (len(row) - 1)) / len(row)
        for place, layer in enumerate(row):
            x = left + place * (width + 2.5)
            style = {"boxstyle": "round,pad=0,rounding_size=0.7", "facecolor": FILLS[layer["knows"]]}
            axes.add_patch(FancyBboxPatch((x, y), width, tall, edgecolor="#8a8a8a", lw=0.8, **style))
            # The purpose stands beside the name, or below it where layers share a row.
            text = textwrap.fill(layer["purpose"], (200, 60, 37)[len(row) - 1])
            beside = len(row) == 1
            label = layer["name"] + ("/" if (PACKAGE / layer["name"]).is_dir() else ".py")
            at = (x + 1.2, y + tall / 2) if beside else (x + 1.2, y + tall - 0.7)
            axes.text(*at, label, va="center" if beside else "top", fontsize=10.5, weight="bold", family="monospace")
            at = (x + 21, y + tall / 2) if beside else (x + 1.2, y + tall - 2.5)
            axes.text(*at, text, va="center" if beside else "top", fontsize=8.4, linespacing=1.15)
            if place:
                arrow = {"arrowstyle": "<->", "lw": 1, "color": "#555555", "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", (x, y + tall / 2), (x - 2.5, y + tall / 2), arrowprops=arrow)
            if layer["knows"] == "torch alone":
                axes.text(
                    right - 1.2, y + tall / 2, "torch alone", ha="right", va="center", fontsize=9.5, style="italic"
                )
        ends.append((any(layer["knows"] == "Lightning" for layer in row), y, y + tall))
        y -= gap
    arrow = {"arrowstyle": "-|>,head_width=0.5,head_length=0.9", "lw": 2.5, "color": "#333333"}
    axes.annotate("", (5.5, 2), (5.5, top), arrowprops=arrow)
    axes.text(3, 52, "imports go downwards, never upwards", rotation=90, ha="center", va="center", fontsize=11)
    for with_lightning, text in ((True, "may import Lightning"), (False, "never import Lightning")):
        low = min(low for w, low, _ in ends if w is with_lightning)
        high = max(high for w, _, high in ends if w is with_lightning)
        axes.plot([92, 93, 93, 92], [high, high, low, low], color="#333333", lw=1.2)
        axes.text(95.5, (low + high) / 2, text, rotation=90, ha="center", va="center", fontsize=11)
    figure.savefig(path, dpi=110, metadata={KEY: json.dumps(rows)})


if __name__ == "__main__":
    draw(read(), PICTURE)
