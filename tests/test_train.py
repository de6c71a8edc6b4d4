"""The command line end to end, as a user meets it: on the digits, on pictures, and with everything that goes wrong."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli import begin, ended_as, flywheel, rows
from conftest import small_disk

from flywheel_fast import config, trainer
from flywheel_fast.data.pipelines import Loader

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["optim.epochs=3", "cycle.warmup=1", "data.train_size=200", "data.test_size=100"]


def refused(result, status, *said):
    assert result.returncode == status, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("flywheel-fast: ") and all(str(part) in last for part in said), last


def test_digits_are_learnt_and_the_wrong_labels_found(tmp_path):
    """README's first command, and what docs/run_folder.md says it leaves behind."""
    assert "&& flywheel-fast train   " in README
    result = flywheel("train", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run, said = tmp_path / "runs" / "digits", result.stdout
    last = {key: float(value) for key, value in rows(run)[-1].items() if value}
    assert last["test_acc_aux"] >= 0.975 and last["test_acc_main"] >= 0.97
    assert last["selection_auroc"] >= 0.99 and last["classes_alive"] == 10
    assert abs(last["gamma"] - last["true_clean"]) <= 0.03
    assert last["refurbish_acc"] > 0.97 and last["posterior_acc"] > 0.97
    assert last["lr"] < 1e-6  # the schedule ends with the run
    assert "test accuracy, last epoch" in said and "issues.csv" in said and "COLLAPSED" not in said

    docs = (ROOT / "docs/run_folder.md").read_text()
    files, columns = docs.split("## issues.csv")[0], docs.split("## metrics.csv")[1]
    for name in re.findall(r"^\| `([^`]+)` \|", files, re.M):
        on_request = ("bad_files.csv", "report.html", "embedding.npz", "review/", "reviews.csv", "export/")
        on_request += ("tensorboard/", ".launcher", "features/", "labels/oddities.csv")
        assert (run / name).exists() or name in on_request, name
    header = list(rows(run)[0])
    assert header[:8] == (
        "cycle test_acc_main test_acc_aux gamma true_clean selection_auroc refurbish_acc classes_alive".split()
    )
    assert [column for column in header if f"`{column}`" not in columns] == []
    with open(run / "labels/issues.csv", newline="") as file:
        issues = list(csv.DictReader(file))
    assert len(issues) == 1347
    scores = [float(row["label_score"]) for row in issues if row["is_label_issue"] == "true"]
    assert 450 < len(scores) < 520 and scores == sorted(scores)
    assert sum(row["given_label"] != row["true_label"] for row in issues[:100]) >= 95  # visibly wrong
    entropy = np.array([float(row["entropy"]) for row in issues])
    agree = np.array([row["networks_agree"] == "true" for row in issues])
    history = np.array([int(row["times_suspected"]) for row in issues])
    assert 0 <= entropy.min() and entropy.max() <= 1 and agree.mean() > 0.99
    prob = np.array([float(row["suggested_prob"]) for row in issues])
    assert entropy[prob > 0.9].mean() < 0.01 < 0.2 < entropy[prob.argmin()]  # none is less sure than .6
    assert history.max() == 8 and history[: len(scores)].mean() > 7 and history[len(scores) :].mean() < 0.5
    assert json.loads((run / "env.json").read_text())["torch"]
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["epochs"] == 40
    from safetensors import safe_open

    with safe_open(run / "weights/model.safetensors", "pt") as weights:
        assert json.loads(weights.metadata()["flywheel_fast"])["classes"] == list("0123456789")


@pytest.mark.parametrize("notable", [0.0, 1.0])
def test_the_share_of_time_spent_waiting_is_told(tmp_path, monkeypatch, notable):
    drawn = Loader.epoch

    def epoch(loader, *given):
        time.sleep(1)  # until the first batch
        yield from drawn(loader, *given)

    monkeypatch.setattr(Loader, "epoch", epoch)
    monkeypatch.setattr(trainer, "NOTABLE_WAITING", notable)
    words = ["cycle.kind=cross_entropy", "optim.epochs=1", *SHORT[1:]]
    trainer.Trainer(config.load(trainer.Config, "digits", words), tmp_path).run()
    (row,) = rows(tmp_path)
    seconds = {key: float(value) for key, value in row.items() if key.startswith("sec_")}
    share = seconds["sec_data"] / (sum(seconds.values()) - seconds["sec_save"])
    assert seconds["sec_data"] >= 1 and abs(float(row["waiting"]) - share) < 1e-3
    told = [line for line in (tmp_path / "train.log").read_text().splitlines() if line.startswith("waiting")]
    assert len(told) == (notable == 0)
    in_all = seconds["sec_data"] / sum(seconds.values())
    assert all(f"{in_all:.0%} of the time passed waiting for images" in line for line in told)


def test_cross_entropy_is_worse_and_fills_its_columns_only(tmp_path):
    result = flywheel("train", "cycle.kind=cross_entropy", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    last = rows(tmp_path / "runs/digits")[-1]
    assert float(last["test_acc_main"]) <= 0.92
    assert last["test_acc_aux"] == last["gamma"] == last["selection_auroc"] == ""
    assert (tmp_path / "runs/digits/plots/curves.png").exists()


def test_the_literal_cycle_collapses_and_says_so(tmp_path):
    result = flywheel("train", "digits_literal", "optim.epochs=16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    last = rows(tmp_path / "runs/digits_literal")[-1]
    assert float(last["test_acc_aux"]) < 0.9 and int(last["classes_alive"]) < 10
    assert "COLLAPSED" in result.stdout and "has all but vanished" in result.stdout
    assert "COLLAPSED" in (tmp_path / "runs/digits_literal/train.log").read_text()


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_a_run_killed_in_the_middle_of_a_cycle_ends_with_the_same_bytes(tmp_path):
    words = ["train", "optim.epochs=8", "cycle.warmup=2", "--out", "killed", "--resume", "auto"]
    words += ["--checkpoint-every", "4"]
    assert flywheel(*words[:3], "--out", "whole", cwd=tmp_path).returncode == 0
    for wanted in (3, 5):  # killed twice, a little after an epoch has ended: in the middle of the next
        process = begin(*words, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while len(rows(tmp_path / "killed")) < wanted:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(rows(tmp_path / "killed")) < 8
    result = flywheel(*words, cwd=tmp_path)
    assert result.returncode == 0 and "going on after epoch" in result.stdout
    assert ended_as(tmp_path / "killed") == ended_as(tmp_path / "whole")


def test_more_epochs_on_a_finished_run_and_a_changed_config_refused(tmp_path):
    assert flywheel("train", *SHORT, "--out", "a", cwd=tmp_path).returncode == 0
    refused(
        flywheel("train", "--resume", "a", "optim.lr=1", "cycle.gamma=0.4", cwd=tmp_path), 2, "optim.lr", "cycle.gamma"
    )
    refused(flywheel("train", "--resume", "b", cwd=tmp_path), 2, "b/weights/last.pt", "auto")
    refused(flywheel("train", "--resume", "a", "--out", "b", cwd=tmp_path), 2, "--out b")
    refused(flywheel("train", "--resume", "a", "--overwrite", cwd=tmp_path), 2, "--overwrite")
    result = flywheel("train", "--resume", "a", "optim.epochs=5", cwd=tmp_path)
    assert result.returncode == 0 and [row["cycle"] for row in rows(tmp_path / "a")] == list("12345")
    for name in ("last.pt", "previous.pt"):
        checkpoint = tmp_path / "a/weights" / name
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    refused(flywheel("train", "--resume", "a", cwd=tmp_path), 2, "a/weights/previous.pt", "cut short")


def test_ctrl_c_ends_with_a_resumable_run_and_130(tmp_path):
    words = ["train", "optim.epochs=12", "cycle.warmup=1", "data.train_size=400", "--out", "a"]
    process = begin(*words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "a/metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "train --resume a`" in error and "Traceback" not in error
    assert len(rows(tmp_path / "a")) < 12
    assert flywheel("train", "--resume", "a", cwd=tmp_path).returncode == 0
    assert len(rows(tmp_path / "a")) == 12


def test_folders_are_numbered_kept_and_replaced_only_when_told(tmp_path):
    tiny = ["train", "optim.epochs=1", "cycle.kind=cross_entropy", "data.train_size=50", "data.test_size=20"]
    for _ in range(2):
        assert flywheel(*tiny, "name=x", cwd=tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["x", "x-2"]
    refused(flywheel(*tiny, "--out", "runs/x", cwd=tmp_path), 2, "runs/x", "--overwrite")
    assert flywheel(*tiny, "--out", "runs/x", "--overwrite", cwd=tmp_path).returncode == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/train.log").write_text("of another program")
    (tmp_path / "theirs/thesis.tex").write_text("years of work")
    refused(flywheel(*tiny, "--out", "theirs", "--overwrite", cwd=tmp_path), 2, "theirs", "thesis.tex")
    assert flywheel(*tiny, "--out", "theirs", "--resume", "auto", cwd=tmp_path).returncode == 0
    assert (tmp_path / "theirs/thesis.tex").read_text() == "years of work"
    refused(flywheel(*tiny, "--out", "mine", "--overwrite", cwd=tmp_path), 2, "mine")
    refused(flywheel(*tiny, "--out", "mine", "--resume", "auto", cwd=tmp_path), 2, "mine")
    refused(flywheel(*tiny, "--out", "mine/thesis.tex", cwd=tmp_path), 2, "is a file")
    refused(flywheel(*tiny, "--out", "/proc/nowhere", cwd=tmp_path), 2, "/proc/nowhere")
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


# -- other data, other machines ----------------------------------------------------------------------------------------


def test_a_csv_of_unknown_truth_trains_and_names_its_suspects(folder, tmp_path):
    table = folder / "labels.csv"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*g"))
    table.write_text("file_name,label\n" + "".join(f"{name},{name.split('/')[1]}\n" for name in names))
    config = ["cifar10_small", "data.source=csv", f"data.root={table}", "cycle.warmup=1", "optim.epochs=2"]
    result = flywheel("train", *config, "--out", "a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    last = rows(tmp_path / "a")[-1]
    assert last["gamma"] and last["true_clean"] == last["selection_auroc"] == ""


def test_without_native_ops_the_result_is_the_same_within_rounding(tmp_path):
    results = {}
    for native in "10":
        result = flywheel(
            "train", *SHORT, "optim.precision=fp32", "--out", native, cwd=tmp_path, FLYWHEEL_NATIVE=native
        )
        assert result.returncode == 0, result.stderr
        assert ("reference" in result.stdout) == (native == "0")
        results[native] = float(rows(tmp_path / native)[-1]["gamma"])
    assert abs(results["0"] - results["1"]) < 1e-3


def test_two_strong_views_and_soft_targets_run(tmp_path):
    words = ["cycle.contrastive=0.1", "cycle.target=soft_q", "cycle.posterior=joint", "optim.schedule=onecycle"]
    result = flywheel("train", *SHORT, *words, "--out", "a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def cifar(outside_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    shutil.unpack_archive(outside_data / "cifar10-jpeg.tar.xz", folder)
    return folder


def test_human_labels_on_pictures_by_option(cifar, outside_data, tmp_path):
    noise = ["data.noise.kind=file", f"data.noise.file={outside_data / 'cifar10n.npz'}", "data.noise.key=worse_label"]
    short = ["data.train_size=2000", "data.test_size=200", "optim.epochs=10", "cycle.warmup=5"]
    result = flywheel("train", "cifar10_small", f"data.root={cifar}", *noise, *short, "--out", "a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    last = {key: float(value) for key, value in rows(tmp_path / "a")[-1].items() if value}
    assert 0.55 < last["true_clean"] < 0.65  # 40 % of the human labels are wrong
    assert last["selection_auroc"] > 0.62 and last["test_acc_aux"] > 0.3
    seconds = {key: sum(float(row[key] or 0) for row in rows(tmp_path / "a")) for key in last if key.startswith("sec_")}
    assert seconds["sec_em"] < 0.02 * sum(seconds.values())


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_words_are_refused_by_name(tmp_path):
    (tmp_path / "my.yaml").write_text("optim: {lrr: 1}")
    refused(flywheel("config", "check", "my.yaml", cwd=tmp_path), 2, "my.yaml", "optim.lrr", "'optim.lr'")
    refused(flywheel("train", "nowhere.yaml", cwd=tmp_path), 2, "nowhere.yaml")
    refused(flywheel("train", "digits", "cifar10", cwd=tmp_path), 2, "digits, cifar10")
    refused(flywheel("train", "cifar10_small", cwd=tmp_path), 2, "data.root", "cifar10")
    assert not (tmp_path / "runs/cifar10_small").exists()  # nothing began
    refused(flywheel("train", "cycle.warmup=50", cwd=tmp_path), 2, "cycle.warmup=50", "optim.epochs=40")
    refused(flywheel("train", "data.noise.kind=file", cwd=tmp_path), 2, "data.noise.file")
    refused(flywheel("train", "model.main.name=timm/resnt50", cwd=tmp_path), 2, "'resnt50'", "timm/resnet50")
    assert flywheel("train", "--bogus", cwd=tmp_path).returncode == 2


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path):
    result = flywheel("train", *SHORT, "optim.lr=1e30", "--out", "a", cwd=tmp_path)
    refused(result, 1, "became nan", "epoch", "optim.lr")


def test_a_full_disk_is_named_and_the_checkpoint_before_survives(tmp_path):
    with small_disk(tmp_path / "small", "8m") as small:
        assert flywheel("train", *SHORT, "--out", small / "a", cwd=tmp_path).returncode == 0
        before = (small / "a/weights/last.pt").read_bytes()
        (small / "fill").write_bytes(b"x" * max(0, shutil.disk_usage(small).free - 100_000))
        result = flywheel("train", "--resume", small / "a", "optim.epochs=5", cwd=tmp_path)
        refused(result, 1, "No space left")
        assert (small / "a/weights/last.pt").read_bytes() == before
        (small / "fill").unlink()
        assert flywheel("train", "--resume", small / "a", "optim.epochs=5", cwd=tmp_path).returncode == 0


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in flywheel("train", "nowhere.yaml", "--debug", cwd=tmp_path).stderr


# -- the other commands ------------------------------------------------------------------------------------------------


def test_config_commands(tmp_path):
    listed = flywheel("config", "ls", cwd=tmp_path).stdout
    assert all(name in listed for name in ("digits", "digits_literal", "cifar10_small", "cifar10"))
    shown = flywheel("config", "show", "digits", "optim.lr=0.3", cwd=tmp_path).stdout
    assert yaml.safe_load(shown)["optim"]["lr"] == 0.3 and "# Peak learning rate" in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert flywheel("config", "check", "shown.yaml", cwd=tmp_path).returncode == 0


def test_doctor_finds_nothing_broken_here(tmp_path):
    result = flywheel("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "BROKEN" not in result.stdout and "DALI" in result.stdout and "torch" in result.stdout


def test_readme_names_only_what_exists():
    for name in re.findall(r"^\| `(\w+)` \|", README, re.M):
        assert (ROOT / "configs" / f"{name}.yaml").exists(), name
    assert all(command in README for command in ("pip install -e .", "flywheel-fast doctor", "--resume auto"))
