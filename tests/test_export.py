"""One file for other programs: it computes what the network does, and names the classes."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flywheel_fast import cli, export
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.predict import Predictor

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    words = ["optim.epochs=2", "cycle.warmup=1", "cycle.contrastive=0.1", "data.train_size=200", "data.test_size=50"]
    assert cli.main(["train", "digits", *words, "views.mean=[100,120,140]", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def known(run, tmp_path_factory):
    """Images [7, 16, 16, 3] uint8 of the networks' size, and what `predict` says of them [7, C]."""
    folder = tmp_path_factory.mktemp("images")
    images = np.random.default_rng(1).integers(256, size=(7, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    predictor = Predictor(run)
    predictor.learner.bf16 = False
    probabilities, _, broken = predictor.probabilities(sorted(folder.iterdir()))
    assert not broken
    return images, probabilities


def about(text):
    found = json.loads(text)
    assert found["classes"] == CLASSES and found["input"].startswith("uint8 [B, 16, 16, 3], RGB: shorter side")


def test_onnx(run, known, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert cli.main(["export", str(run), "--format", "onnx"]) == 0
    assert f"{run / 'export' / 'model.onnx'} (by onnxruntime: probabilities differ" in capsys.readouterr().out
    session = runtime.InferenceSession(str(run / "export" / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (7, 1):
        (found,) = session.run(None, {"images": known[0][:count]})
        np.testing.assert_allclose(found, known[1][:count], atol=1e-4)
    about(session.get_modelmeta().custom_metadata_map["flywheel_fast"])


def test_torchscript(run, known, tmp_path):
    assert cli.main(["export", str(run), "--format", "torchscript", "-o", str(tmp_path / "m.pt")]) == 0
    extra = {"flywheel_fast": ""}
    network = torch.jit.load(str(tmp_path / "m.pt"), _extra_files=extra)
    with torch.no_grad():
        np.testing.assert_allclose(network(torch.from_numpy(known[0])), known[1], atol=1e-4)
    about(extra["flywheel_fast"])


def test_safetensors(run, known):
    from safetensors import safe_open

    out, _ = export.export(run, "safetensors")
    with safe_open(out, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
        about(file.metadata()["flywheel_fast"])
    predictor = Predictor(run)
    network = predictor.learner.ema.module
    network.projection = None
    served = export.Served(network, ViewsConfig()).eval()  # of another mean, which the file brings
    for value in served.state_dict().values():
        value.zero_()
    served.load_state_dict(weights)
    with torch.no_grad():
        np.testing.assert_allclose(served(torch.from_numpy(known[0])), known[1], atol=1e-4)


def test_a_file_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    to_onnx = torch.onnx.export

    def altered(served, *args, **options):
        other = copy.deepcopy(served)
        other.mean += 40
        return to_onnx(other, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", altered)
    with pytest.raises(Failure, match="differs from the network"):
        export.export(run, "onnx", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_what_is_there_is_kept_and_what_is_missing_named(run, tmp_path, monkeypatch):
    (tmp_path / "mine.onnx").write_text("mine")
    with pytest.raises(BadInput, match="is there already"):
        export.export(run, "onnx", tmp_path / "mine.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BadInput, match=r"needs onnx: pip install 'flywheel-fast\[export\]'"):
        export.export(run, "onnx")
    with pytest.raises(BadInput, match="finished run"):
        export.export(tmp_path, "torchscript")
    assert (tmp_path / "mine.onnx").read_text() == "mine"
