"""A pretrained network: what is frozen stays, deep layers change least, and pictures look as it saw them."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from flywheel_fast import cli, config, models
from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.pipelines import Loader
from flywheel_fast.data.views import ViewsConfig
from flywheel_fast.distributed import ALONE, Group
from flywheel_fast.errors import BadInput
from flywheel_fast.learner import Learner, OptimConfig
from flywheel_fast.models import NetworkConfig
from flywheel_fast.trainer import Config, with_preprocessing

PLAIN = OptimConfig(epochs=4, lr=0.1, momentum=0.0, weight_decay=0.0, ema_decay=0.5, precision="fp32")
LAYERED = "timm/mobilenetv3_small_050"


def learner(name: str = "small_cnn", group: Group = ALONE, **changes) -> Learner:
    """Of two steps an epoch."""
    built = models.build(NetworkConfig(name, width=4), 3, 32, seed=0)
    return Learner(built, replace(PLAIN, schedule="constant", **changes), 2, torch.device("cpu"), group)


def step(learner: Learner, part: slice = slice(None)) -> None:
    generator = torch.Generator().manual_seed(learner.steps)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(3, (8,), generator=generator)
    learner.step(F.cross_entropy(learner.forward(images[part], torch.arange(8)[part]), labels[part]))


def moved(learner: Learner, before: dict) -> set[str]:
    """What has changed, of weights and statistics: the names' first part."""
    after = learner.network.state_dict()
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def copied(learner: Learner) -> dict:
    return {key: value.clone() for key, value in learner.network.state_dict().items()}


@pytest.mark.parametrize(("freeze", "steps"), [(1, 2), (2, 4), (-1, 8)])
def test_a_frozen_backbone_stays_as_it_is_while_the_head_learns(freeze, steps):
    frozen = learner(freeze=freeze, momentum=0.9, weight_decay=0.1)
    start = copied(frozen)
    for _ in range(steps):
        step(frozen)
    assert moved(frozen, start) == {"head"}
    average = frozen.ema.module.state_dict()
    assert all(torch.equal(average[key], start[key]) for key in start if key.startswith("backbone."))
    if freeze > 0:
        again = learner(freeze=freeze, momentum=0.9, weight_decay=0.1)  # what was saved goes on as what went on
        again.load_state_dict(deepcopy(frozen.state_dict()))
        for one in (frozen, again):
            step(one)
        assert moved(frozen, start) == {"head", "backbone"} and not moved(again, copied(frozen))


def test_frozen_statistics_stay_while_the_weights_learn():
    kept = learner(freeze_norm=True)
    start = copied(kept)
    step(kept)
    end = kept.network.state_dict()
    statistics = [key for key in start if "running_" in key or "num_batches" in key]
    assert statistics and all(torch.equal(start[key], end[key]) for key in statistics)
    assert not torch.equal(start["backbone.0.0.weight"], end["backbone.0.0.weight"])


def test_deep_layers_learn_at_a_lower_rate():
    rates = {}
    for layer_decay in (1.0, 0.5):
        one = learner(LAYERED, layer_decay=layer_decay, freeze_norm=True)
        start = copied(one)
        step(one)
        end = one.network.state_dict()
        rates[layer_decay] = {key: (end[key] - start[key]).norm() for key in start if end[key].is_floating_point()}
    shares = {key: (rates[0.5][key] / rate).item() for key, rate in rates[1.0].items() if rate > 1e-6}
    assert shares["head.weight"] == pytest.approx(1)
    assert shares["backbone.blocks.4.0.conv_pw.weight"] == pytest.approx(2**-4, rel=0.01)
    assert shares["backbone.conv_stem.weight"] < 2**-8
    assert one.optimizer.param_groups[0]["lr"] == 0.1  # what metrics.csv tells
    with pytest.raises(BadInput, match=r"optim\.layer_decay.*timm/NAME"):
        learner(layer_decay=0.5)


class Distributed(Group):
    """Of one process, whose gradients go through DistributedDataParallel nevertheless."""

    def parallel(self, network, all_used):
        return Group(0, 2).parallel(network, all_used)


def test_of_several_processes_what_is_frozen_thaws_too(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        one, alone = (learner(group=group, freeze=1, freeze_norm=True) for group in (Distributed(), ALONE))
        start = copied(one)
        for learnt in ({"head"}, {"head"}, {"head", "backbone"}, {"head", "backbone"}):
            step(one)
            step(alone)
            assert moved(one, start) == learnt
        assert not moved(one, copied(alone))
        del one
    finally:
        distributed.destroy_process_group()


def test_what_views_leave_open_is_the_network_s():
    network = ["model.main.name=timm/tf_efficientnet_lite0", "views.crop=resized"]
    open_, set_ = (
        ["views.image_size=null", "views.mean=null", "views.std=null", "views.crop_pct=null"],
        "views.std=[1,2,3]",
    )
    found = with_preprocessing(config.load(Config, None, [*network, *open_])).views
    assert (found.image_size, found.crop_pct, found.mean, found.std) == (224, 0.875, (127.5,) * 3, (127.5,) * 3)
    found = with_preprocessing(config.load(Config, None, [*network, *open_, "views.image_size=96", set_])).views
    assert (found.image_size, found.std, found.resized) == (96, (1, 2, 3), 110)
    whole = config.load(Config, "digits", [])
    assert with_preprocessing(whole) is whole
    with pytest.raises(BadInput, match=r"optim\.freeze.*model\.\*\.weights"):
        config.load(Config, "digits", ["optim.freeze=1"])


def test_the_clean_view_is_as_much_of_a_picture_as_crop_pct_says(tmp_path):
    import numpy as np
    from PIL import Image

    picture = np.zeros((200, 200, 3), np.uint8)
    picture[50:150, 50:150] = 255
    Image.fromarray(picture).save(tmp_path / "square.png")
    manifest = Manifest(tmp_path, np.array(["square.png"]), np.zeros(1, np.int64), ("square",))
    for crop_pct, white in ((1.0, 0.25), (0.5, 1.0), (0.875, 0.25 / 0.875**2)):
        views = ViewsConfig(image_size=56, crop="resized", crop_pct=crop_pct, mean=(0, 0, 0), std=(255, 255, 255))
        ((_, (clean,)),) = Loader(manifest, views, 1, 0).sweep()
        assert clean.shape == (1, 3, 56, 56) and clean.mean().item() == pytest.approx(white, abs=0.02)


def test_photos_are_fine_tuned_and_the_network_needs_no_weights_file_then(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "cycle.kind=cross_entropy",
        "views.image_size=32",
        "optim.epochs=2",
        "optim.batch_size=8",
        "data.threads=1",
    ]
    assert cli.main(["train", "photos", f"data.root={folder}", *small, "--out", "run"]) == 0
    used = config.load(Config, "run/config.yaml").views
    assert (used.image_size, used.crop_pct, used.mean, used.std) == (32, 0.875, (127.5,) * 3, (127.5,) * 3)
    monkeypatch.setattr(models, "_weights_file", None)
    assert cli.main(["predict", "run", str(folder / "test"), "-o", "out.csv"]) == 0
