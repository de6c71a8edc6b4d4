"""README and docs/ keep their word: each command in them is run, on miniatures where they say DIR, and each example.

Trainings are cut to two epochs. What is under a mark `<!-- not run here: WHY -->` is parsed, and its config resolved.
"""

import dataclasses
import os
import re
import shlex
import shutil
from pathlib import Path

import made_labels
import numpy as np
import pytest
from conftest import write_image
from PIL import Image

from benchmarks import accuracy, label_errors
from docs import pictures, tables
from flywheel_fast import audit, cli, config, run_folder
from flywheel_fast.data import fixtures, reviews
from flywheel_fast.trainer import Config

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"(<!-- not run here: [^>]+ -->\n\n)?((?:^    +\S.*\n)+)", re.M)
PROGRAMS = ("flywheel-fast ", "python -m benchmarks")
CUT = ["optim.epochs=2", "cycle.warmup=1", "eval_every=1", "data.threads=1"]
INSTALLING = ("pip ", "pytest")  # is what a machine for tests has done
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
NOT_RUN = {"README.md": 1, "docs/data.md": 5, "docs/paper.md": 10, "docs/performance.md": 1}  # commands under the mark
SERVES = ("review",)  # runs until it is stopped; its own tests drive it


def commands(page):
    """Each command of a page as words, and whether it is only to be parsed."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for mark, block in BLOCK.findall(text):
        for line in re.sub(r"\\\n\s+", "", block).splitlines():
            for part in line.strip().split(" && "):
                if part.startswith(PROGRAMS):
                    yield shlex.split(part, comments=True), bool(mark)
                else:
                    assert part.startswith(INSTALLING), f"{page}: {part!r} is no command that a test can run"


def examples(page):
    return [code for kind, code in FENCED.findall((ROOT / page).read_text(encoding="utf-8")) if kind == "python"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, miniatures):
    """A folder with everything that commands name."""
    place, rng = tmp_path_factory.mktemp("docs"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                write_image(place / "PHOTOS" / split / name / f"{number}.png", rng, size=(16, 16))
    rows = [f"train/{name}/{number}.png,{name}\n" for name in ("cat", "dog") for number in range(6)]
    (place / "PHOTOS" / "labels.csv").write_text("file_name,label\n" + "".join(rows))
    (place / "my.yaml").write_text("name: mine\n")
    words = ["train", "digits", *CUT, "data.train_size=200", "data.test_size=50"]
    for name in ("digits", "digits-2", "NAME"):
        assert cli.main([*words, "--out", str(place / "runs" / name)]) == 0
    digits = Path(os.environ["XDG_CACHE_HOME"], "flywheel-fast", "digits-v1")
    (place / "DATA").symlink_to(digits)
    shutil.copytree(digits / "test" / "3", place / "FOLDER")
    with open(place / "runs" / "digits" / "labels" / "issues.csv", encoding="utf-8") as file:
        first = file.readlines()[1].split(",")
    (place / "FILE").mkdir()
    (place / "FILE" / "answers.csv").write_text(f"file_name,label\n{first[0].strip(chr(34))},3\n")
    return place


def run(words, miniatures):
    """The command in the folder at hand, cut short."""
    words = [str(_miniature(words, miniatures)).join(word.rsplit("DIR", 1)) for word in words]
    if words[0] == "train":
        own = [
            word for word in words if "=" in word and not word.startswith(tuple(key.split("=")[0] for key in CUT[:2]))
        ]
        name = [word for word in words[1:] if "=" not in word]
        small = ["data.train_size=100", "data.test_size=30"] if not any("data." in word for word in own) else []
        words = ["train", *name, *own, *small, *CUT]
    assert cli.main(words) == 0, shlex.join(words)


def _miniature(words, miniatures):
    kinds = {kind.replace("-", "_"): kind for kind in fixtures.KINDS}
    return next((miniatures / kind for name, kind in kinds.items() if name in words), "DIR")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run(page, place, miniatures, monkeypatch):
    monkeypatch.chdir(place)
    shutil.rmtree("MINI", ignore_errors=True)  # another page's
    parsed = 0
    for words, only_parsed in commands(page):
        if words[:2] == ["python", "-m"]:
            parsed += only_parsed
            check_benchmark(words[2:])
        elif only_parsed or words[1] in SERVES:
            parsed += only_parsed
            args = cli._parser().parse_args(words[1:])
            if words[1] == "review":  # nobody decides anything
                Path(words[2], "reviews.csv").write_text(",".join(reviews.COLUMNS) + "\n")
            if words[1] in ("train", "data"):
                config.load(Config, *cli._config_and_changes(args.words))
        else:
            run(words[1:], miniatures)
    assert parsed == NOT_RUN.get(page, 0)


def check_benchmark(words):
    module, *rest = words
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    plans = [word for word in rest if word.endswith(".yaml")]
    for plan in plans if module == "benchmarks.accuracy" else []:
        assert accuracy.read_plan(ROOT / plan)
    if module == "benchmarks.label_errors":
        assert (ROOT / label_errors.PLAN).is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_every_example_runs(page, place, monkeypatch, capsys):
    pytest.importorskip("cleanlab")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(place)
    cli.main(["export", "runs/digits", "--format", "onnx"])
    scope: dict = {}
    for code in examples(page):
        code = code.replace('config="digits"', f'config="digits", changes={CUT}')
        exec(compile(code, page, "exec"), scope)
    assert len(scope["run"].issues()) == len(scope["run"].labels.given)


def test_the_tables_of_the_readme_are_those_of_the_results(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.filled(readme) == readme, "python docs/tables.py"
    assert len(tables.PLACE.findall(readme)) == 2
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "x.md").write_text("# A\n\nwords\n\n| a |\n| --- |\n| 1 |\n\nmore\n\n| b |\n")
    text = "<!-- table x.md -->\nold\n<!-- end of table -->\n"
    assert tables.filled(text) == "<!-- table x.md -->\n\n| a |\n| --- |\n| 1 |\n\n<!-- end of table -->\n"


def test_the_picture_of_the_problem_has_a_suspect_of_each_class(place, tmp_path):
    files = np.array([f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(6)])
    given = np.repeat([0, 1], 6)
    found = made_labels.labels(given, 1 - given, np.full(12, 0.01), classes=("cat", "dog"), root=place / "PHOTOS")
    audit.write_labels(dataclasses.replace(found, files=files), tmp_path / "labels")
    pictures.problem(tmp_path, tmp_path / "problem.png")
    assert Image.open(tmp_path / "problem.png").size == (1350, 240)
    assert len(pictures.plt.gcf().axes) == 2


def test_links_and_run_folder_names_exist():
    for page in PAGES:
        for name, _, anchor in re.findall(
            r"\]\((?!http)([^)#]*)(#([^)]*))?\)", (ROOT / page).read_text(encoding="utf-8")
        ):
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), f"{page}: {name}"
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{page}: {name}#{anchor}"
    documented = set(re.findall(r"`([\w.]+)/?`", (ROOT / "docs/run_folder.md").read_text()))
    assert run_folder.OWN <= documented | {"weights", "labels", "plots"}
