"""The house rules that a machine can hold: imports point downwards, and configs need no accelerator library."""

import ast
from pathlib import Path

import flywheel_fast

PACKAGE = Path(flywheel_fast.__file__).parent
FLOORS = [  # a module may import from floors below its own, and from the rooms named for it beside itself
    {"errors", "config", "__init__", "data.__init__", "data.cifar"},
    {"reference", "_C"},
    {"ops", "distributed"},
    {"em", "losses", "models", "learner", "env"}
    | {"data.manifest", "data.order", "data.pickles", "data.views"}
    | {"data.noise", "data.noise_files", "data.reviews"},
    {"data.sources.folders", "data.sources.tables", "data.sources.lists", "data.sources.arrays"}
    | {"data.sources.shards", "data.sources.cache", "data.sources.features", "data.plain"},
    {"data.sources.__init__", "data.fixtures", "data.memory"},
    {"cycle", "data.pipelines", "checkpoint", "run_folder", "screen", "sinks", "pauses"},
    {"data.scan", "data.feature_loader"},
    {"audit", "doctor", "data.check", "heads"},
    {"plots", "labels", "card", "measures", "oddities"},
    {"review", "trainer"},
    {"predict", "embed"},
    {"embedding", "export"},
    {"charts", "duplicates"},
    {"report"},
    {"folder_audit"},
    {"api"},
    {"cli"},
    {"__main__"},
]
BESIDE = {
    ("data.noise", "data.manifest"),
    ("data.noise", "data.noise_files"),
    ("data.noise_files", "data.manifest"),
    ("data.reviews", "data.manifest"),
    ("data.noise_files", "data.pickles"),
    *((f"data.sources.{family}", "data.sources.folders") for family in ("tables", "lists", "arrays", "shards")),
    *((f"data.sources.{family}", "data.sources.cache") for family in ("arrays", "shards")),
    *((f"data.sources.{family}", "data.sources.tables") for family in ("shards", "features")),
    ("data.sources.features", "data.sources.folders"),
    ("run_folder", "checkpoint"),
    ("config", "errors"),
    ("__init__", "api"),  # when one of its names is first used
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flywheel_fast"):
            below = node.module.removeprefix("flywheel_fast").lstrip(".")
            for name in node.names:
                inner = f"{below}.{name.name}".lstrip(".")
                path = PACKAGE / inner.replace(".", "/")
                if (path / "__init__.py").exists():
                    yield f"{inner}.__init__"
                else:
                    yield inner if path.with_suffix(".py").exists() or inner == "_C" else below


def test_imports_point_downwards():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module, tree in modules():
        assert module in floor, f"{module} has no floor: give it one"
        for other in imported(tree):
            other = f"{other}.__init__".lstrip(".") if (PACKAGE / other.replace(".", "/")).is_dir() else other
            assert floor[other] < floor[module] or (module, other) in BESIDE, f"{module} imports {other}"


def test_only_the_pipelines_import_dali():
    for module, tree in modules():
        names = {
            name
            for node in ast.walk(tree)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert module == "data.pipelines" or not any(name.startswith("nvidia") for name in names), module


def test_the_cycle_knows_no_files():
    tree = dict(modules())["cycle"]
    assert not [name for name in imported(tree) if name.startswith(("data", "checkpoint", "trainer"))]
