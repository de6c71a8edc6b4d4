"""Test images in the plane, and the page that shows them: of the network of a run, whichever it is."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flywheel_fast import charts, cli, config, embedding, models, report
from flywheel_fast.errors import BadInput
from flywheel_fast.predict import Predictor
from flywheel_fast.trainer import Config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    words = ["optim.epochs=4", "cycle.kind=cross_entropy", "data.noise.kind=none", "data.test_size=200"]
    assert cli.main(["train", "digits", *words, "--out", str(out)]) == 0
    return out


def test_what_the_network_takes_for_alike_lies_together(run):
    found = embedding.of_run(run)
    assert found.points.shape == (200, 2) and found.available == 200
    assert np.bincount(found.labels).tolist() == [20] * 10 and found.classes.tolist() == list("0123456789")
    apart = np.linalg.norm(found.points[:, None] - found.points, axis=2) + np.diag(np.full(200, np.inf))
    assert np.mean(found.labels[apart.argmin(axis=1)] == found.labels) > 0.7  # by chance a tenth


def test_features_are_what_the_head_sees(run):
    predictor = Predictor(run)
    files = sorted((predictor.config.data.root or embedding.sources.load(predictor.config.data).test.root).rglob("7/*"))
    head = predictor.learner.ema.module.head
    features, index = predictor.features(files[:30])
    probabilities, same, _ = predictor.probabilities(files[:30])
    assert index.tolist() == same.tolist() == list(range(30))
    with torch.no_grad():
        np.testing.assert_allclose(head(torch.from_numpy(features)).softmax(dim=1), probabilities, atol=0.02)


def test_it_is_drawn_once_for_a_network(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    first = embedding.of_run(copy)
    nowhere = tmp_path / "nowhere"
    assert np.array_equal(embedding.of_run(copy, images=nowhere).points, first.points)
    with open(copy / "weights" / "model.safetensors", "ab") as file:
        file.write(b"other")
    with pytest.raises(BadInput):
        embedding.of_run(copy)
    shutil.copy(run / "weights" / "model.safetensors", copy / "weights" / "model.safetensors")
    (copy / embedding.CACHE).write_bytes(b"something else")
    with pytest.raises(BadInput, match="nowhere: holds no test images"):
        embedding.of_run(copy, images=nowhere)
    np.testing.assert_allclose(embedding.of_run(copy).points, first.points)


def test_the_page_has_a_point_an_image_or_says_why_not(run, tmp_path):
    page = report.write([run], tmp_path / "page.html").read_text()
    (plane,) = re.findall(r'<svg class="plane".*?</svg>', page, re.S)
    assert plane.count("<circle") == 200 and re.findall(r">(\d)</text>", plane) == list("0123456789")
    assert "200 of 200 test images<" in page
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(embedding.CACHE))
    page = report.write([copy], tmp_path / "page.html", images=tmp_path).read_text()
    assert "Not drawn: <bdi>" in page and "holds no test images any more" in page and 'class="plane"' not in page


def test_any_network_will_do(tmp_path):
    """Of timm, wherever its features come from, and however slow it is: what a moment lets it see."""
    words = ["model.main.name=timm/mobilenetv3_small_050", "views.image_size=32", "data.test_size=60"]
    settings = config.load(Config, "digits", words)
    (tmp_path / "config.yaml").write_text(config.dump(settings))
    (tmp_path / "weights").mkdir()
    network = models.build(settings.model.main, 10, 32, seed=0)
    about = {"classes": [str(label) for label in range(10)], "config": config.dump(settings)}
    metadata = {"flywheel_fast": json.dumps(about)}
    save_file(network.state_dict(), tmp_path / "weights" / "model.safetensors", metadata)
    found = embedding.of_run(tmp_path)
    assert found.points.shape == (60, 2) and np.isfinite(found.points).all()


def test_of_many_classes_twenty_are_drawn():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(100, 2)).astype(np.float32), np.arange(100) % 20
    drawn = charts.plane(embedding.Embedding(points, labels, np.array([f"class {k}" for k in range(50)]), 5000))
    assert drawn["title"] == "100 of 5,000 test images, of the first 20 classes"
    assert len({group["hue"] for group in drawn["groups"]}) == 20
    x, y = np.array([point for group in drawn["groups"] for point in group["points"]]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (8, 352, 8, 222)
