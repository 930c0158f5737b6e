"""Draw what a run prints at its end: python docs/picture.py RUN_FOLDER docs/digits.svg"""

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from cpq_lightning.report.table import levels_table, metrics_table

run, target = Path(sys.argv[1]), Path(sys.argv[2])
console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True)
content = json.loads((run / "levels.json").read_text())
console.print(levels_table(content))
console.print()
console.print(metrics_table(content["run"]))
svg = console.export_svg(title="cpq fit --config recipes/digits.yaml")
# Any monospaced font will do: the picture loads nothing from elsewhere.
target.write_text(re.sub(r"\s*@font-face \{.*?\}|\s*<!--.*?-->", "", svg, flags=re.DOTALL))
