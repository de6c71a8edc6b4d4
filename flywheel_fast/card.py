"""README.md of a run folder, the card of its network: what was trained, on what noise, how well, how to use it."""

import json

import numpy as np

from flywheel_fast import audit

NOISES = {
    "symmetric": "symmetric at rate {rate}, drawn by seed {seed}",
    "asymmetric": "asymmetric at rate {rate}, drawn by seed {seed}",
    "pair": "to the next class at rate {rate}, drawn by seed {seed}",
    "instance": "dependent on the image at rate {rate}, drawn by seed {seed}",
    "file": "the labels of a file",
}
TEXT = """---
library_name: flywheel-fast
pipeline_tag: image-classification
tags: [image-classification, learning-with-noisy-labels]
---

# {name}

An image classifier of {count} classes, trained by [flywheel-fast](https://arxiv.org/abs/2401.04390) on labels of
which a part is wrong.{verdict}

## Trained

{trained}

## On what labels

{labels}

## How well

{quality}

## Use

    flywheel-fast predict RUN FOLDER -o out.csv
    flywheel-fast evaluate RUN DATA
    flywheel-fast export RUN --format onnx

RUN is this folder. Input: RGB, {size} x {size} pixels. {classes}

## Limits

- It knows these classes alone, and pictures like those that it was trained on.
- {tested}
- `label_score` is what the two networks make of a label; on natural images it has been overconfident.

`config.yaml` repeats the run, `env.json` has its versions; `result.json` the figures.
"""


def text(config, classes: tuple[str, ...], record: dict, labels: audit.Labels | None, ailments: list[str]) -> str:
    """Markdown. `config`: the run's, `record`: its result.json, `labels`: None for plain cross-entropy, `ailments`:
    sentences on what is amiss."""
    used = "aux" if labels else "main"
    accuracy = record.get(f"test_acc_{used}")
    network = config.model.main if used == "main" else config.model.aux or config.model.main
    noise = config.data.noise
    trained = {
        "network": network.name + (f", weights {network.weights}" if network.weights else ""),
        "method": "plain cross-entropy"
        if config.cycle.kind == "cross_entropy"
        else "LNL-flywheel, the auxiliary network",
        "data": f"{record['images']:,} images, data.source={config.data.source}",
        "epochs": f"{record['epochs']}, in {record['seconds']:,.0f} s; seed {config.seed}",
    }
    said = {"sha256 of all training labels": record["noise_sha256"]}
    if noise.kind != "none":
        said["noise that was added"] = NOISES[noise.kind].format(rate=noise.rate, seed=noise.seed)
    if "true_clean" in record:
        said["wrong in truth"] = f"{1 - record['true_clean']:.1%}"
    quality = {}
    if accuracy is not None:
        quality["test accuracy, last epoch"] = f"{accuracy:.4f}"
        quality["best epoch, not chosen by it"] = f"{record[f'best_test_acc_{used}']:.4f}"
    if labels:
        found = audit.summary(labels)
        said["wrong by estimate"] = f"{found.estimated_wrong:.1%}"
        quality["labels to look at"] = f"{found.suspects:,}"
        if found.suspects:
            quality["of them wrong, by estimate"] = f"{1 - found.false_alarms:.1%}"
        if found.precision is not None:
            quality["of them wrong, in truth"] = f"{found.precision:.1%}"
        if labels.true is not None:
            error = audit.calibration(labels.clean_prob, labels.given == labels.true).error
            auroc, precision = audit.selection_quality(labels.clean_prob, labels.given, labels.true)
            if not np.isnan(auroc):
                quality["wrong labels told from right, AUROC"] = f"{auroc:.4f}"
                quality["the same, average precision"] = f"{precision:.4f}"
            quality["calibration error of label_score"] = f"{error:.3f}"
    return TEXT.format(
        name=_plain(config.name),
        count=len(classes),
        verdict=" **Do not use it: " + " ".join(_plain(said) for said in ailments) + "**" if ailments else "",
        trained=_table(trained),
        labels=_table(said),
        quality=_table(quality)
        if quality
        else "Nothing was measured: there is no test split, and no true label is known.",
        size=config.views.image_size,
        classes=_classes(classes),
        tested=_tested(config, accuracy),
    )


def _tested(config, accuracy: float | None) -> str:
    if accuracy is None:
        return "It was not tested on images set aside."
    if config.data.noise.kind == "none":
        return "The labels of the test images may be wrong too: the accuracy is agreement with them."
    return "The test images have the source's own labels, without the noise that was added."


def _classes(classes: tuple[str, ...], most: int = 200) -> str:
    shown = ", ".join(f"`{_plain(name)}`" for name in classes[:most])
    return f"Classes: {shown}" + (f" and {len(classes) - most:,} more." if len(classes) > most else ".")


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _plain(said: str) -> str:
    """On one line, and nothing in it ends a table's cell, a code span, or starts a tag."""
    said = json.dumps(said, ensure_ascii=False)[1:-1].replace('\\"', '"')  # control characters show as \\n, \\u0007
    return said.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
