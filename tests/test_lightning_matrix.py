"""The cells of the table of what of Lightning works, run; some of them with ``-m thorough`` only."""

import warnings

import pytest

from benchmarks.lightning_matrix.cells import CELLS


def _marks(cell):
    marks = [pytest.mark.thorough] if cell.thorough else []
    # Two runs that look for a free port at the same moment may find the same one.
    return [*marks, pytest.mark.xdist_group("ddp")] if cell.feature == "processes" else marks


@pytest.mark.parametrize("cell", [pytest.param(c, id=c.name, marks=_marks(c)) for c in CELLS])
def test_lightning(cell, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cell.run(tmp_path)


def test_the_written_table_has_every_cell_and_no_failure():
    from benchmarks.lightning_matrix.__main__ import RESULT

    text = RESULT.read_text()
    missing = [cell.name for cell in CELLS if f"| {cell.feature} | {cell.value} |" not in text]
    assert missing == []
    assert "fails" not in text
