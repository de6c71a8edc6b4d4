"""Plots that open, whatever the classes are called, and pictures of any kind."""

import numpy as np
import pytest
from made_labels import drawn, labels
from PIL import Image

from flywheel_fast import plots
from flywheel_fast.errors import BadInput


@pytest.fixture(scope="module")
def metrics_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "metrics.csv"
    path.write_text(
        "cycle,test_acc_main,test_acc_aux,gamma,true_clean,selection_auroc,refurbish_acc,classes_alive\n"
        "1,0.5,,,0.7,,,\n2,,,0.6,0.7,0.8,0.7,10\n3,0.8,0.801,0.65,0.7,0.9,0.8,10\n"
    )
    return path


def sizes(folder):
    result = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            result[path.name] = image.size
    return result


@pytest.mark.parametrize(
    ("c", "n", "known", "corruption", "suspects"),
    [
        (10, 600, True, (1860, 990), (1575, 2145)),
        (100, 600, False, (1425, 1365), (1575, 2145)),
        (2, 10, True, (1110, 615), (1575, 420)),
    ],
)
def test_plots_open_at_their_size(tmp_path, metrics_csv, c, n, known, corruption, suspects):
    plots.write_plots(drawn(n, c, tmp_path / "images", known), metrics_csv, tmp_path / "plots")
    found = sizes(tmp_path / "plots")
    assert sorted(found) == ["clean_prob.png", "corruption.png", "curves.png", "suspects.png"]
    assert found["curves.png"] == (1800, 480)
    assert found["clean_prob.png"] == (1050, 540)
    assert found["corruption.png"] == corruption
    assert found["suspects.png"] == suspects


def test_plots_with_nasty_names_and_no_suspects(tmp_path, metrics_csv, recwarn):
    plots.write_plots(labels(range(6), range(6), [0.9] * 6), metrics_csv, tmp_path)
    assert sizes(tmp_path)["suspects.png"] == (1050, 180)
    assert not recwarn.list


def test_a_run_without_cycles_has_curves_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("cycle,test_acc_main,test_acc_aux,gamma,true_clean\n1,0.5,,,0.7\n")
    plots.write_plots(None, tmp_path / "metrics.csv", tmp_path / "plots")
    assert sizes(tmp_path / "plots") == {"curves.png": (600, 480)}


def test_a_run_that_measured_nothing_says_so(tmp_path):
    (tmp_path / "metrics.csv").write_text("cycle,test_acc_main,true_clean\n1,,0.7\n")
    plots.write_plots(None, tmp_path / "metrics.csv", tmp_path / "plots")
    assert sizes(tmp_path / "plots") == {"curves.png": (1050, 180)}


def test_curves_end_in_their_names_and_last_values(metrics_csv):
    accuracy, gamma, auroc = plots._curves(plots.read_metrics(metrics_csv)).axes
    assert [text.get_text() for text in accuracy.texts] == ["main 80.0%", "auxiliary 80.1%"]
    assert accuracy.texts[1].get_position()[1] - accuracy.texts[0].get_position()[1] == pytest.approx(0.08)
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[3], [1, 3]]
    assert [text.get_text() for text in gamma.texts] == ["estimated 65.0%", "true 70.0%"]
    assert gamma.lines[1].is_dashed()
    assert [text.get_text() for text in auroc.texts] == ["AUROC 0.900"]


@pytest.mark.parametrize("content", ["epoch,gamma\n1,0.5\n", "cycle,gamma\n1,much\n", None])
def test_something_else_in_place_of_the_metrics(tmp_path, content):
    if content:
        (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(BadInput, match=r"metrics\.csv: is not a run's metrics\.csv"):
        plots.write_plots(None, tmp_path / "metrics.csv", tmp_path)


# -- pictures ----------------------------------------------------------------------------------------------------------

MIDDLE = plots.TILE // 2
PICTURES = {
    "grey.png": Image.new("L", (8, 8), 128),
    "grey16.png": Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)),
    "palette.png": Image.new("RGB", (300, 200), (128, 128, 128)).convert("P"),
    "see_through.png": Image.new("RGBA", (8, 8), (128, 128, 128, 255)),
    "photo.jpg": Image.new("RGB", (2000, 1500), (128, 128, 128)),
    "print.jpg": Image.new("CMYK", (64, 64), (0, 0, 0, 127)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_any_kind_of_picture_fills_its_tile(tmp_path, name):
    PICTURES[name].save(tmp_path / name)
    tile = plots._tile(tmp_path / name)
    assert (tile.mode, tile.size) == ("RGB", (plots.TILE, plots.TILE))
    assert tile.getpixel((0, MIDDLE)) == tile.getpixel((MIDDLE, MIDDLE)) == pytest.approx((128, 128, 128), abs=2)


def test_a_tall_picture_keeps_its_shape(tmp_path):
    Image.new("RGB", (50, 100)).save(tmp_path / "tall.png")
    tile = plots._tile(tmp_path / "tall.png")
    assert tile.getpixel((MIDDLE, 0)) == (0, 0, 0)
    assert tile.getpixel((plots.TILE // 4 - 2, MIDDLE)) != (0, 0, 0) == tile.getpixel((plots.TILE // 4 + 2, MIDDLE))


def test_a_missing_or_broken_file_is_an_empty_tile_with_its_name(tmp_path):
    found = labels([0, 1], [1, 0], [0.05, 0.06], root=tmp_path)
    (tmp_path / "train").mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / found.files[1])
    whole = (tmp_path / found.files[1]).read_bytes()
    (tmp_path / found.files[1]).write_bytes(whole[: len(whole) // 2])
    first, second = plots._sheet(found).axes[:2]
    assert [text.get_text() for text in first.texts] == [
        *("cannot be read:\ntrain/0, “0”.png", 'a,b\n→ say "hi"', "score 0.050"),
    ]
    assert second.texts[0].get_text() == "cannot be read:\ntrain/1, “1”.png"


def test_the_sheet_shows_the_worst_36(tmp_path):
    found = drawn(600, 3, tmp_path)
    shown = [axes for axes in plots._sheet(found).axes if axes.images]
    assert len(shown) == 36
    scores = [f"score {found.clean_prob[i]:.3f}" for i in found.suspects[:36]]
    assert [axes.texts[-1].get_text() for axes in shown] == scores


def test_one_sample_of_two_classes(tmp_path, metrics_csv):
    plots.write_plots(labels([0], [1], [0.25], classes="ab"), metrics_csv, tmp_path)
    assert len(sizes(tmp_path)) == 4
