"""benchmarks.growth and benchmarks.step on sizes that take no time."""

import json

import numpy as np
import pytest

from benchmarks import growth, step


def test_a_cell_has_every_figure_and_lines_their_exponents(tmp_path):
    cell = growth.measure(1003, 7, tmp_path)
    assert set(cell) == set(growth.FIELDS) - {"versions"} and all(cell[name] >= 0 for name in growth.STEPS)
    assert cell["peak_gb"] >= cell["baseline_gb"] > 0 and cell["parquet_mb"] > 0
    sizes = [10**k for k in range(3, 8)]
    assert growth.exponent(sizes, [1e-5 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [1e-6] * 4 + [1.0]) is None
    cells = [(n, 10) for n in (1000, 20_000)] + [(20_000, c) for c in (2, 100)]
    rows = [cell | {"n": n, "c": c} for n, c in cells]
    assert [row["n"] for row in growth._line(rows, "n")] == [1000, 20_000]
    assert [row["c"] for row in growth._line(rows, "c")] == [2, 10, 100]
    growth.plot(json.loads(json.dumps(rows)), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_the_bare_loops_have_the_passes_that_are_told(monkeypatch):
    """Images looked at, and a forward and backward pass counted thrice: of an epoch of 512 images."""
    passes = {"look": 0, "learn": 0}

    def counted(what):
        return lambda self, images, *labels: passes.__setitem__(what, passes[what] + len(images))

    for what in passes:
        monkeypatch.setattr(step.Bare, what, counted(what))
    found = {}
    for name, run in step.loops("small_cnn", "fp32", step.torch.device("cpu"), 512).items():
        passes |= dict.fromkeys(passes, 0)
        run()
        found[name] = (passes["look"] + 3 * passes["learn"]) / 512
    assert found == {"bare": 14, "SSR": 11, "DivideMix": 20}


def test_a_trainer_and_its_bare_loop_are_timed(tmp_path, capsys):
    step.main(["--networks", "small_cnn", "--images", "64", "--quick", "--out", str(tmp_path)])
    last = (tmp_path / "step.md").read_text().strip().splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[:2] == ["small_cnn", "64"] and len(cells) == 8 and cells.pop(5) == "–"  # nothing is compiled
    assert all(np.array(cells[4:], float) > 0)
    assert (tmp_path / "step.csv").read_text().count("\nsmall_cnn,64,") == 4
    assert last in capsys.readouterr().out
