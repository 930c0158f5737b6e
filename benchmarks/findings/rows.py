"""The rows of the campaign: a JSON line for each finished run, appended whole and never changed."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.findings.runs import Run
from benchmarks.train_step.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "findings.jsonl"
Row = dict[str, Any]


class Rows:
    """Finished runs, in a file that several campaigns, in two environments for example, may add to.

    Of a run that it has twice the last row counts.

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
        """Read what the file has now."""
        self._by_key = {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        # A last line without its end was cut off while it was written: that run counts as not done.
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if line.endswith("\n"):
                row = self._parse(line, number)
                self._by_key[Run.of(row).key] = row

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
        """Add a finished run; a line that was cut off makes room for it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # Another campaign may add a row too.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(row).encode() + b"\n")
        self._by_key[Run.of(row).key] = row

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
