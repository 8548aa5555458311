"""The rules of the house that an import or a string could break, read off the syntax trees."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors", "config", "platform", "parallel", "artifact", "metrics", "stage", "ops", "sections"),
    ("model", "data"),
    ("train", "eval"),
    ("prune", "distill", "report"),
    ("search",),
)
STAGES = LAYERS[-2]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SOURCES = sorted([*ROOT.glob("minitron/**/*.py"), *ROOT.glob("launch/*.py")])
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in SOURCES}
LIBRARY = {path: tree for path, tree in TREES.items() if path.parts[0] == "minitron"}
LAUNCH = {path: tree for path, tree in TREES.items() if path.parts[0] == "launch"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of all that a module imports, wherever in the file it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def code_strings(tree: ast.AST) -> Iterator[str]:
    """String constants, without those that stand alone as documentation."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    for node in constants:
        if isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def room(path: Path) -> str:
    """The module or package directly below minitron/ that a file belongs to."""
    return path.with_suffix("").parts[1]


def rooms_imported(tree: ast.AST) -> set[str]:
    names = [name.split(".") for name in imports(tree)]
    return {parts[1] for parts in names if parts[0] == "minitron" and parts[1] in LEVEL}


def test_the_trees_are_there():
    assert len(LIBRARY) > 20
    assert {room(path) for path in LIBRARY} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_imports_go_down(path):
    if room(path) == "__init__":
        assert not rooms_imported(TREES[path])
        return
    level = LEVEL[room(path)]
    others = rooms_imported(TREES[path]) - {room(path)}
    above = {name for name in others if LEVEL[name] > level}
    assert not above, f"{path} imports from above: {above}"
    if room(path) in STAGES:
        beside = others & set(STAGES)
        assert not beside, f"{path} imports another stage: {beside}"


def test_rooms_do_not_import_each_other_in_a_circle():
    graph = {name: set() for name in LEVEL}
    for path, tree in LIBRARY.items():
        if room(path) in graph:
            graph[room(path)] |= rooms_imported(tree) - {room(path)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", [p for p in LIBRARY if room(p) == "sections"], ids=str)
def test_sections_import_nothing_that_takes_time(path):
    others = rooms_imported(TREES[path]) - {"sections"}
    packages = {name.split(".")[0] for name in imports(TREES[path])} - {"minitron"}
    assert others <= {"errors"}
    assert packages <= sys.stdlib_module_names


@pytest.mark.parametrize("path", TREES, ids=str)
def test_nobody_imports_a_launch_script(path):
    scripts = {p.stem for p in LAUNCH}
    first = {name.split(".")[0] for name in imports(TREES[path])}
    assert not first & {"launch", "tests", *scripts}


@pytest.mark.parametrize("path", TREES, ids=str)
def test_only_parallel_reads_the_parallel_state(path):
    attributes = {n.attr for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute)}
    parts = {part for name in imports(TREES[path]) for part in name.split(".")}
    reads = bool({"parallel_state", "mpu"} & (attributes | parts))
    assert reads == (path == Path("minitron/parallel.py"))


@pytest.mark.parametrize("path", TREES, ids=str)
def test_only_platform_knows_the_device(path):
    if path == Path("minitron/platform.py"):
        return
    tree = TREES[path]
    strings = [s for s in code_strings(tree) if any(w in s for w in ("cuda", "nccl", "gloo"))]
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not strings
    assert "cuda" not in attributes


@pytest.mark.parametrize("path", TREES, ids=str)
def test_only_one_file_knows_the_config_library(path):
    uses = any(name.split(".")[0] == "jsonargparse" for name in imports(TREES[path]))
    assert uses == (path == Path("minitron/config/typed.py"))


@pytest.mark.parametrize("path", TREES, ids=str)
def test_only_two_tables_know_the_names_of_hugging_face(path):
    if path in (Path("minitron/model/hf.py"), Path("minitron/model/sharding.py")):
        return
    names = ("_proj.", "embed_tokens", "lm_head", "post_attention_layernorm", "model.layers")
    strings = [s for s in code_strings(TREES[path]) if any(name in s for name in names)]
    assert not strings
