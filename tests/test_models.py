"""Networks by name, weights from files, and wrong ones named."""

import pytest
import torch
from safetensors.torch import save_file

from flywheel_fast import models
from flywheel_fast.errors import BadInput
from flywheel_fast.models import NetworkConfig, build


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
    with pytest.raises(BadInput, match=r"weights\.pth: no such file"):
        build(config, 10, 32, 0)
    path.write_bytes(b"not weights")
    with pytest.raises(BadInput, match=r"weights\.pth: not a state dict"):
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
    with pytest.raises(BadInput, match=r"backbone\.0\.0\.weight.*\[8, 3, 3, 3\].*\[32, 3, 3, 3\]"):
        build(NetworkConfig(weights=str(path)), 10, 32, 0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("small_cn", "small_cnn"), ("timm/resnet5", "timm/resnet"), ("torchvision/resnet19", "torchvision/resnet")],
)
def test_unknown_names_name_the_nearest(name, nearest):
    with pytest.raises(BadInput, match=nearest):
        build(NetworkConfig(name), 10, 32, 0)


def test_small_cnn_costs_what_its_docstring_says():
    from torch.utils.flop_counter import FlopCounterMode

    network = models.build(NetworkConfig(), 10, 32, 0)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 32, 32))
    assert 11.9e6 < counter.get_total_flops() / 2 < 12.1e6
    assert 0.23e6 < sum(p.numel() for p in network.parameters()) < 0.25e6
