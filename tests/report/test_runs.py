import csv
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from cpq_lightning.report.runs import common_folder, compare_runs, expand_runs, read_run, sibling_runs, write_runs
from cpq_lightning.report.table import runs_table


def run(
    folder, model="resnet18", data="Digits", size=5_000_000, before=0.9, full=None, quantized=0.89, bits=3.0, **more
):
    folder.mkdir(parents=True)
    states = {"before quantization": before, "full precision": full, "quantized": quantized}
    metrics = {state: {"val_loss": 0.5, "val_acc": value} for state, value in states.items() if value is not None}
    totals = {"weight_bits_avg": bits, "act_bits_avg": 4.0, "size_bytes": size, "fp32_bytes": 46_000_000}
    content = {"format": "cpq-levels", "version": 1, "totals": totals, "layers": []}
    content |= {"run": {"model": model, "data": data, "metrics": metrics, "monitor": "val_acc"}} | more
    (folder / "levels.json").write_text(json.dumps(content))
    return folder


def test_a_run_is_read_from_its_folder(tmp_path):
    found = read_run(run(tmp_path / "version_3"))
    assert (found.name, found.model, found.metric) == ("version_3", "resnet18", "val_acc")
    assert (found.state, found.value, found.weight_bits, found.size_bytes) == ("quantized", 0.89, 3.0, 5_000_000)
    assert read_run(tmp_path / "version_3", metric="val_loss").value == 0.5


def test_a_run_that_was_never_quantized_takes_part_at_its_own_size(tmp_path):
    found = read_run(run(tmp_path / "baseline", before=None, full=0.91, quantized=None))
    assert (found.state, found.value, found.weight_bits, found.size_bytes) == ("full precision", 0.91, None, 46_000_000)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no metric 'f1': it has \['val_acc', 'val_loss'\]"):
        read_run(run(tmp_path / "a"), metric="f1")
    with pytest.raises(ValueError, match="has no metrics"):
        read_run(run(tmp_path / "b", before=None, quantized=None))
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        read_run(tmp_path)


def test_runs_beside_one_another_are_those_of_the_same_model_on_the_same_data(tmp_path):
    own = run(tmp_path / "logs" / "version_1", bits=2.5)
    run(tmp_path / "logs" / "version_0")
    run(tmp_path / "logs" / "version_2", model="vit")
    run(tmp_path / "logs" / "version_4", data="Flowers")
    (tmp_path / "logs" / "version_5").mkdir()
    (tmp_path / "logs" / "version_5" / "levels.json").write_text("not ours")
    assert [found.name for found in sibling_runs(own)] == ["version_0", "version_1"]


def test_a_folder_of_runs_is_all_of_them_in_order(tmp_path):
    for number in (10, 9, 1):
        run(tmp_path / f"version_{number}")
    found = expand_runs([tmp_path])
    assert [path.name for path in found] == ["version_1", "version_9", "version_10"]
    assert expand_runs([found[1], found[0]]) == [found[1], found[0]]
    assert common_folder(found) == tmp_path
    assert len(expand_runs([tmp_path, found[0]])) == 3


def test_runs_are_compared_by_one_metric_under_names_of_their_own(tmp_path):
    a, b = run(tmp_path / "a" / "version_0"), run(tmp_path / "b" / "version_0", data="Flowers")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "levels.json").write_text(json.dumps({"format": "cpq-levels", "layers": [], "totals": {}}))
    runs, left_out = compare_runs([a, b, tmp_path / "c"], metric="val_loss")
    assert [(r.name, r.metric, r.data) for r in runs] == [
        ("a/version_0", "val_loss", "Digits"), ("b/version_0", "val_loss", "Flowers"),
    ]  # fmt: skip
    assert len(left_out) == 1
    assert "has no metrics: the run had no validation, or an older version" in left_out[0]
    assert [column.header for column in runs_table(runs).columns][:2] == ["run", "data"]
    with pytest.raises(ValueError, match="has no metrics"):
        compare_runs([tmp_path / "c", tmp_path / "c"])


@pytest.mark.pictures
def test_table_csv_and_picture(tmp_path):
    baseline = run(tmp_path / "full", before=None, full=0.91, quantized=None)
    folders = [run(tmp_path / "one", before=None), run(tmp_path / "two", quantized=None, size=900), baseline]
    runs = [read_run(folder) for folder in folders]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(runs_table(runs))
    text = console.export_text()
    for word in ("one", "0.8900", "5 MB", "46 MB", "3.00", "900 B", "val_acc", "0.9100", "fp32"):
        assert word in text
    # What was measured in the middle of a run is no result.
    assert "0.9000" not in text
    table, picture = write_runs(runs, tmp_path / "out")
    rows = list(csv.DictReader(table.open()))
    assert [row["value"] for row in rows] == ["0.89", "", "0.91"]
    assert Image.open(picture).size[0] > 500


def test_runs_are_found_in_the_folders_that_loggers_make(tmp_path):
    for place in ("root/lightning_logs/version_10", "root/lightning_logs/version_9", "root/a/b/c/too_deep"):
        run(tmp_path / place)
    names = ["version_9", "version_10"]
    assert [path.name for path in expand_runs([tmp_path / "root"])] == names
    assert [path.name for path in expand_runs([tmp_path])] == names


def test_the_only_metric_is_the_one_that_is_compared(tmp_path):
    metrics = {"quantized": {"val_loss": 0.25}}
    folder = run(tmp_path / "a", **{"run": {"model": "net", "data": "series", "metrics": metrics}})
    assert (read_run(folder).metric, read_run(folder).value) == ("val_loss", 0.25)


@pytest.mark.parametrize("entry", [{}, {"monitor": None}], ids=["a file of an older version", "none"])
def test_of_several_metrics_none_is_compared_unless_one_is_singled_out(tmp_path, entry):
    metrics = {"quantized": {"val_loss": 0.25, "val_acc": 0.9}}
    folder = run(tmp_path / "a", **{"run": {"model": "net", "data": "series", "metrics": metrics, **entry}})
    with pytest.raises(ValueError, match=r"singles out none of its metrics \['val_acc', 'val_loss'\]: .*--metric"):
        read_run(folder)
    assert read_run(folder, metric="val_acc").value == 0.9
