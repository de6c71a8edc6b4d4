"""benchmarks.loader in small: every kind of row is measured, and the tables hold them."""

import csv

from benchmarks import loader


def test_the_table_of_a_few_drawn_pictures(tmp_path, monkeypatch, capsys):
    rows = [row for row in loader.plan(quick=True) if "64 px" not in row.images and len(row.views) == 1]
    monkeypatch.setattr(loader, "plan", lambda quick: rows)
    loader.main(["--quick", "--out", str(tmp_path)])
    with open(tmp_path / "loader.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["images"], row["kept"], row["views"]) for row in found] == [
        ("32 px", "decoded", "1"),
        ("400 px JPEG to 224", "nothing", "1"),
        ("224 px", "decoded", "1"),
    ]
    for row in found:
        ratio = float(row["ours_median"]) / float(row["torchvision_median"])
        assert abs(float(row["ratio"]) / ratio - 1) < 1e-2 and float(row["torchvision_cpu_ms"]) > 0
    text = (tmp_path / "loader.md").read_text()
    assert text == capsys.readouterr().out
    assert "| libjpeg-turbo, bare | " in text and "| 100% | " in text and "| color_twist, 224 px | " in text
