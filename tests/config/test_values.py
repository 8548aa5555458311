"""What recipes hold: from flags, from YAML, and written again."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from minitron import config
from minitron.errors import MinitronError
from tests.config.recipe import (
    Data,
    Recipe,
    Schedule,
    Teacher,
    Train,
    parse,
    parse_yaml,
    paths,
)

EAGER = Teacher(path=Path("t"), load="eager")


def test_defaults_are_those_of_the_classes():
    assert parse() == Recipe(out=Path("o"))
    assert parse().train.lr == 0.5  # the recipe's default of the section, not the section's own


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--seed", "7"], "seed", 7),
        (["--seed=-7"], "seed", -7),
        (["--seed", "-7"], "seed", -7),
        (["--train.lr", "1e-4"], "train.lr", 1e-4),
        (["--train.lr", "2"], "train.lr", 2.0),
        (["--train.lr", "1", "--train.lr", "2"], "train.lr", 2.0),
        (["--train.clip", "null"], "train.clip", None),
        (["--train.schedule.warmup", "3"], "train.schedule.warmup", 3),
        (["--train.schedule.betas", "[0.8, 1e-1]"], "train.schedule.betas", (0.8, 0.1)),
        (["--name", "null"], "name", None),
        (["--name", "007"], "name", "007"),
        (["--name", "[a: b"], "name", "[a: b"),
        (["--name", ""], "name", ""),
        (["--name=--x=y"], "name", "--x=y"),
        (["--budget", "5"], "budget", 5),
        (["--budget", "all"], "budget", "all"),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "--seed", "1"], "overwrite", True),
        (["--overwrite", "true"], "overwrite", True),
        (["--overwrite", "--overwrite", "false"], "overwrite", False),
        (["--data.path", "a b"], "data.path", paths("a b")),
        (["--data.path", "a", "--seed", "1", "--data.path", "b"], "data.path", paths("a", "b")),
        (["--data.path", "[a, b]", "--data.path=c"], "data.path", paths("a", "b", "c")),
        (["--data.path", "[]"], "data.path", []),
        (["--data.weights", "1e-1", "--data.weights", "2"], "data.weights", [0.1, 2.0]),
        (["--data.weights", "null"], "data.weights", None),
        (["--data.drop", "3", "--data.drop", "4"], "data.drop", (3, 4)),
        (["--data.mix", "{a: 1e-1, b: 2}"], "data.mix", {"a": 0.1, "b": 2.0}),
        (["--teacher.path", "t"], "teacher", Teacher(path=Path("t"))),
        (["--teacher", "t", "--teacher.load", "eager"], "teacher", EAGER),
        (["--teacher", "{path: t, load: eager}"], "teacher", EAGER),
        (["--teacher", "t", "--teacher", "null"], "teacher", None),
        (["--data", "a"], "data.path", paths("a")),
    ],
)  # fmt: skip
def test_flags(argv, path, value):
    result = parse(*argv)
    for name in path.split("."):
        result = getattr(result, name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("train: {lr: 1e-4}", "train.lr", 1e-4),
        ("train: {lr: 1}", "train.lr", 1.0),
        ("train: {clip: null}", "train.clip", None),
        ("train: {clip: }", "train.clip", None),
        ("train:\n  # all commented out", "train", Train(lr=0.5)),
        ("train.schedule: {warmup: 3}", "train.schedule.warmup", 3),
        ("train.schedule.warmup: 3", "train.schedule.warmup", 3),
        ("name: 1e-4", "name", "1e-4"),
        ("name: no", "name", "no"),
        ("name: 'null'", "name", "null"),
        ("name: 2024-01-01", "name", "2024-01-01"),
        ("overwrite: true", "overwrite", True),
        ("data: {path: a}", "data.path", [Path("a")]),
        ("data: a", "data.path", [Path("a")]),
        ("data: {path: [a, 5]}", "data.path", [Path("a"), Path("5")]),
        ("data: {weights: [1, 1e-1]}", "data.weights", [1.0, 0.1]),
        ("teacher: t", "teacher", Teacher(path=Path("t"))),
        ("teacher: {path: t}", "teacher", Teacher(path=Path("t"))),
        ("teacher: null", "teacher", None),
        ("data: {mix: &m {warmup: 3}}\ntrain: {schedule: {<<: *m}}", "train.schedule.warmup", 3),
    ],
)  # fmt: skip
def test_yaml(tmp_path, text, path, value):
    result = parse_yaml(tmp_path, f"out: o\n{text}\n")
    for name in path.split("."):
        result = getattr(result, name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("config_last", [False, True])
def test_flags_win_over_yaml_wherever_they_stand(tmp_path, config_last):
    file = tmp_path / "r.yaml"
    file.write_text("out: y\ntrain: {steps: 1, lr: 1}\ndata: {path: [a, b]}\nteacher: t")
    flags = ["--train.lr", "2", "--data.path", "c", "--teacher.load", "eager"]
    source = ["--config", str(file)]
    recipe = config.parse(Recipe, flags + source if config_last else source + flags)
    assert (recipe.out, recipe.train.steps, recipe.train.lr) == (Path("y"), 1, 2.0)
    assert recipe.data.path == [Path("c")]  # replaced, not extended
    assert recipe.teacher == Teacher(path=Path("t"), load="eager")


def test_an_optional_section_is_switched_off_and_on_again(tmp_path):
    assert parse_yaml(tmp_path, "out: o\nteacher: {path: t}", "--teacher", "null").teacher is None
    on = parse_yaml(tmp_path, "out: o\nteacher: null", "--teacher.path", "u")
    assert on.teacher == Teacher(path=Path("u"))


def test_a_later_config_file_wins(tmp_path):
    for name, text in (("a", "out: o\nseed: 1\nname: a"), ("b", "seed: 2")):
        (tmp_path / name).write_text(text)
    recipe = config.parse(Recipe, ["--config", f"{tmp_path}/a", "--config", f"{tmp_path}/b"])
    assert (recipe.seed, recipe.name) == (2, "a")


def test_relative_paths_are_relative_to_the_current_directory(tmp_path):
    assert parse_yaml(tmp_path, "out: sub/o").out == Path("sub/o")


# Writing


FULL = Recipe(
    out=Path("a/b"),
    overwrite=True,
    name="null",
    budget=3,
    train=Train(steps=5, lr=1e-5, clip=None, schedule=Schedule(betas=(0.5, 1e-8))),
    data=Data(path=[Path("x"), Path("5")], weights=[1.0, 1e22], drop=(1,), mix={"é": 0.5}),
    teacher=Teacher(path=Path("1e-4")),
)


@pytest.mark.parametrize("recipe", [FULL, Recipe(out=Path("o"))], ids=["full", "defaults"])
def test_saved_recipe_parses_to_itself(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    config.save(recipe, file)
    assert config.parse(Recipe, ["--config", str(file)]) == recipe
    written = yaml.safe_load(file.read_text())
    assert written == config.to_dict(recipe)
    assert list(written) == [f.name for f in dataclasses.fields(Recipe)]


def test_to_dict_is_plain():
    assert config.to_dict(FULL) == {
        "out": "a/b",
        "seed": 1234,
        "overwrite": True,
        "name": "null",
        "budget": 3,
        "train": {
            "steps": 5,
            "lr": 1e-5,
            "clip": None,
            "schedule": {"warmup": 0, "betas": [0.5, 1e-8]},
        },
        "data": {"path": ["x", "5"], "weights": [1.0, 1e22], "drop": [1], "mix": {"é": 0.5}},
        "teacher": {"path": "1e-4", "load": "lazy"},
    }
    assert config.to_dict(FULL.train.schedule) == {"warmup": 0, "betas": [0.5, 1e-8]}


def test_a_list_takes_several_values_and_commas_between_numbers():
    recipe = parse(
        "--out", "x", "--data.path", "a,b", "c", "--data.drop", "3,4", "--data.path", "d"
    )
    assert recipe.data.path == [Path("a,b"), Path("c"), Path("d")]
    assert recipe.data.drop == (3, 4)
    with pytest.raises(MinitronError, match=r"data.drop=\['3', 'x'\]|data.drop"):
        parse("--out", "x", "--data.drop", "3,x")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: config.Tree = dataclasses.field(default_factory=dict)
    """Keys of another recipe."""


def test_a_recipe_inside_another_stays_text_until_it_is_built(tmp_path):
    file = tmp_path / "outer.yaml"
    file.write_text("inner: {out: 7, train: {lr: 1e-3}, train.steps: 5, data.path: [a, b]}")
    outer = config.parse(Outer, ["--config", str(file)])
    assert outer.inner["train"] == {"lr": "1e-3", "steps": "5"}
    config.save(outer, file)
    assert config.parse(Outer, ["--config", str(file)]) == outer
    assert config.parse(Outer, ["--inner", "{out: 7}"]) == Outer(inner={"out": "7"})

    flags = ["--inner.train.lr", "2", "--inner.data.path", "c", "d", "--inner.overwrite"]
    changed = config.parse(Outer, ["--config", str(file), *flags, "--inner.budget={a: b}"]).inner
    assert changed == {
        "out": "7", "train": {"lr": "2", "steps": "5"}, "data.path": ["c", "d"],
        "overwrite": "true", "budget": {"a": "b"},
    }  # fmt: skip
    assert list(changed)[:3] == list(outer.inner)[:3]
    later = tmp_path / "later.yaml"
    later.write_text("{inner: {train.steps: null, train: {lr: 4}}, inner.name: y}")
    both = config.parse(Outer, ["--config", str(file), "--config", str(later)]).inner
    assert (both["train"], both["name"]) == ({"lr": "4", "steps": None}, "y")

    built = config.build(Recipe, {"seed": 3, "name": "x"}, outer.inner, {"train.steps": 6})
    assert (built.out, built.seed, built.name) == (Path("7"), 3, "x")
    assert (built.train.lr, built.train.steps, built.data.path) == (1e-3, 6, paths("a", "b"))
    with pytest.raises(MinitronError, match=r"^unknown key train.stepz; did you mean train.steps"):
        config.build(Recipe, outer.inner, {"train": {"stepz": 1}})
    assert config.parse(Outer, ["--inner.x", "[y"]).inner == {"x": "[y"}
    for text in ("7", "[a]", "null"):
        with pytest.raises(MinitronError, match=r"^inner=.* is not valid; expected a mapping of k"):
            config.parse(Outer, ["--inner", text])
