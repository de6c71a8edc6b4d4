"""Configs: typed, merged, and wrong ones named with the key, the file and the nearest valid key."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from flywheel_fast import config
from flywheel_fast.errors import BadInput
from flywheel_fast.trainer import Config


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    """Learning
    rate."""
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError("optim.lr must not be negative")


@dataclass(frozen=True)
class Schema:
    seed: int = 0
    classes: tuple[str, ...] = ()
    optim: Optim = field(default_factory=Optim)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_defaults_then_base_then_file_then_overrides(tmp_path):
    write(tmp_path / "base.yaml", "seed: 1\noptim: {lr: 1e-3}\nclasses: [a]")
    name = write(tmp_path / "a.yaml", "base: base.yaml\nseed: 2")
    assert config.load(Schema, name, ["optim.schedule=constant"]) == Schema(2, ("a",), Optim(1e-3, "constant"))


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        ("optim: {lrr: 1}", None, ["a.yaml", "'optim.lrr'", "'optim.lr'"]),
        ("sede: 1", None, ["a.yaml", "'sede'", "'seed'"]),
        ("optim: {lr: fast}", None, ["a.yaml", "optim.lr", "fast"]),
        ("seed: 1.5", None, ["a.yaml", "seed", "1.5"]),
        ("optim: {schedule: cosin}", None, ["a.yaml", "optim.schedule", "cosine"]),
        ("optim: {lr: -1}", None, ["optim.lr must not be negative"]),
        ("optim: 3", None, ["a.yaml", "optim"]),
        ("- 1", None, ["a.yaml", "key: value"]),
        ("seed: [", None, ["a.yaml", "YAML"]),
        ("seed: 1\nseed: 2", None, ["a.yaml", "seed"]),
        ("base: nowhere.yaml", None, ["a.yaml", "nowhere.yaml"]),
        ("base: a.yaml", None, ["a.yaml", "leads back"]),
        ("seed: 1", "optim.lrr=1", ["command line", "'optim.lrr'", "'optim.lr'"]),
        ("seed: 1", "seed", ["'seed'", "key=value"]),
        ("seed: 1", "seed=[", ["seed=[", "YAML"]),
    ],
)
def test_bad_configs_are_named(tmp_path, text, override, said):
    name = write(tmp_path / "a.yaml", text)
    with pytest.raises(BadInput) as error:
        config.load(Schema, name, [override] if override else [])
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_names_the_nearest():
    with pytest.raises(BadInput, match="digits"):
        config.find("digit")


@pytest.mark.parametrize("name", config.shipped())
def test_every_shipped_config_loads_and_survives_its_own_dump(name, tmp_path):
    features = ["data.features=features"] if name == "embeddings" else []
    loaded = config.load(Config, name, features)
    for comments in (False, True):
        path = write(tmp_path / "dump.yaml", config.dump(loaded, comments))
        assert config.load(Config, path) == loaded


def test_every_field_has_its_help():
    for key in config.keys_of(Config):
        schema = Config
        *sections, leaf = key.split(".")
        for section in sections:
            schema = next(f.type for f in config.fields(schema) if f.name == section)
        if not config.is_dataclass(next(f.type for f in config.fields(schema) if f.name == leaf)):
            assert config.help_of(schema).get(leaf), key


def test_difference_names_dotted_keys():
    old = yaml.safe_load("{seed: 1, optim: {lr: 1, momentum: 2}}")
    new = yaml.safe_load("{seed: 1, optim: {lr: 3, momentum: 2}, name: x}")
    assert config.difference(old, new) == ["optim.lr", "name"]
