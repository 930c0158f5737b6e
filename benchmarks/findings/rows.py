"""The rows of the campaign: a JSON line for each finished run, appended whole and never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.findings.runs import Run
from benchmarks.train_step.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "findings.jsonl"
Row = dict[str, Any]


class Rows:
    """Finished runs, in a file that several campaigns (on two machines, in two environments) may add to.

    Args:
        path: The file; it need not be there yet.

    Raises:
        ValueError: a line that is no row of a campaign.
    """

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        self._by_key: dict[tuple[Any, ...], Row] = {}
        self.read()

    def read(self) -> None:
        """Read what the file has now; of a run that it has twice the first row counts."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        # A last line without its end was cut off while it was written: that run counts as not done.
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if line.endswith("\n"):
                row = self._parse(line, number)
                self._by_key.setdefault(Run.of(row).key, row)

    def _parse(self, line: str, number: int) -> Row:
        try:
            row = json.loads(line)
            Run.of(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number} is no row of this benchmark ({error}): remove it, or move the file away."
            ) from error
        return row

    def append(self, row: Row) -> None:
        """Add a finished run, in one write."""
        self._by_key.setdefault(Run.of(row).key, row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row) + "\n"
        self._drop_cut_off()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _drop_cut_off(self) -> None:
        content = self.path.read_bytes() if self.path.is_file() else b""
        if content and not content.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

    def __contains__(self, run: Run) -> bool:
        return run.key in self._by_key

    def __getitem__(self, run: Run) -> Row:
        return self._by_key[run.key]

    def __len__(self) -> int:
        return len(self._by_key)

    def all(self) -> Iterable[Row]:
        """All rows, in the order in which they were finished."""
        return self._by_key.values()

    def of(self, **values: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.all() if all(row[name] == value for name, value in values.items())]
