"""The network of a run as one file for other programs: ONNX, TorchScript or safetensors.

The file takes RGB bytes, `images` [B, H, W, 3] uint8, and gives `probabilities` [B, C] float32: the normalisation is
inside. What stays outside is to bring a picture to H x W. Class names and that recipe go along as metadata.
"""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flywheel_fast.checkpoint import write_atomic
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.errors import BadInput, Failure
from flywheel_fast.predict import Predictor

NAMES = {"onnx": "model.onnx", "torchscript": "model.pt", "safetensors": "model.safetensors"}
TOLERANCE = 1e-3  # of a probability, between torch and onnxruntime
OPSET = 18


class Served(nn.Module):
    """images [B, H, W, 3] uint8 -> probabilities [B, C] float32."""

    def __init__(self, network: nn.Module, views: ViewsConfig):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(views.mean))
        self.register_buffer("std", torch.tensor(views.std))

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images.float() - self.mean) / self.std
        return self.network(normalised.permute(0, 3, 1, 2)).softmax(dim=1)


def export(run: Path, form: str, out: Path | None = None) -> tuple[Path, str]:
    """Writes the network of a run to `out` (RUN/export/model.*); returns where, and how it was checked.

    Raises BadInput where `out` is there already, Failure where the file does not compute what the network does.
    """
    predictor = Predictor(run)
    if out and out.exists():
        raise BadInput(f"-o {out}: is there already; name a new file")
    out = out or run / "export" / NAMES[form]
    views = predictor.config.views
    network = predictor.learner.ema.module.cpu().eval()
    network.projection = None  # of training only
    served = Served(network, views).eval()
    about = {"classes": predictor.classes, "input": _recipe(views), "output": "probabilities, in the order of classes"}
    example = torch.from_numpy(_noise(views.image_size, count=2))
    content, checked = WRITERS[form](served, example, {"flywheel_fast": json.dumps(about, ensure_ascii=False)})
    write_atomic(out, content)
    return out, checked


def _recipe(views: ViewsConfig) -> str:
    size = views.image_size
    shorter = views.resized
    return f"uint8 [B, {size}, {size}, 3], RGB: shorter side resized to {shorter}, the centre {size} x {size} of it"


def _noise(size: int, count: int) -> np.ndarray:  # [count, size, size, 3] uint8
    return np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)


def _onnx(served: Served, example: Tensor, about: dict[str, str]) -> tuple[bytes, str]:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--format onnx needs {error.name}: pip install 'flywheel-fast[export]'") from error
    program = torch.onnx.export(
        served,
        (example,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    return content, _check_onnx(content, served, example.shape[1])


def _check_onnx(content: bytes, served: Served, size: int) -> str:
    """By onnxruntime where it is installed, on batches of other sizes than the example's."""
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in (1, 5):
        images = _noise(size, count)
        (found,) = session.run(["probabilities"], {"images": images})
        with torch.no_grad():
            wanted = served(torch.from_numpy(images)).numpy()
        largest = max(largest, float(np.abs(found - wanted).max()))
    if not largest < TOLERANCE:
        raise Failure(f"the ONNX file differs from the network by {largest:.1e}; nothing was written")
    return f"by onnxruntime: probabilities differ from torch's by {largest:.0e} at most"


def _torchscript(served: Served, example: Tensor, about: dict[str, str]) -> tuple[bytes, str]:
    content, images = io.BytesIO(), torch.from_numpy(_noise(example.shape[1], count=5))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch calls TorchScript deprecated; who asks for it knows
        torch.jit.save(torch.jit.trace(served, (example,)), content, _extra_files=about)
        loaded = torch.jit.load(io.BytesIO(content.getvalue()))
        largest = (loaded(images) - served(images)).abs().max().item()
    if not largest < TOLERANCE:
        raise Failure(f"the TorchScript file differs from the network by {largest:.1e}; nothing was written")
    return content.getvalue(), f"loaded again: probabilities differ by {largest:.0e} at most"


def _safetensors(served: Served, example: Tensor, about: dict[str, str]) -> tuple[bytes, str]:
    from safetensors.torch import save

    weights = {key: value.contiguous() for key, value in served.state_dict().items()}
    return save(weights, about), "weights, mean and std as they are; a program that knows the network builds it"


WRITERS = {"onnx": _onnx, "torchscript": _torchscript, "safetensors": _safetensors}
