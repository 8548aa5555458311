import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from minitron import config
from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate moves."""

    warmup: int = 0
    """Steps to warm up."""
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimisation of the run."""

    steps: int = 10
    """Optimizer steps;
    100% of them."""
    lr: float = 3e-4
    clip: float | None = 1.0
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise MinitronError(f"train.steps={self.steps} is negative; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Data:
    path: list[Path] = field(default_factory=list)
    weights: list[float] | None = None
    drop: tuple[int, ...] = ()
    mix: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen model."""

    path: Path
    """Its directory."""
    load: Literal["lazy", "eager"] = "lazy"


@dataclass(frozen=True, kw_only=True)
class Base:
    out: Path
    """Output directory."""
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Recipe(Base):
    """Train a small model.

    This paragraph is for readers of the code.
    """

    overwrite: bool = False
    name: str | None = None
    budget: Literal["all"] | int = "all"
    train: Train = field(default_factory=lambda: Train(lr=0.5))
    data: Data = Data()
    teacher: Teacher | None = None
    """Distil from this model."""


def parse(*argv: str) -> Recipe:
    return config.parse(Recipe, ["--out", "o", *argv])


def parse_yaml(tmp_path: Path, text: str, *argv: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return config.parse(Recipe, ["--config", str(file), *argv])


def message(*argv: str) -> str:
    with pytest.raises(MinitronError) as caught:
        config.parse(Recipe, list(argv))
    text = str(caught.value)
    assert "\n" not in text
    return text


def yaml_message(tmp_path: Path, text: str, *argv: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("latin-1"))
    text = message("--config", str(file), *argv)
    assert text.startswith(f"{file}: ")
    return text.removeprefix(f"{file}: ")


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


EAGER = Teacher(path=Path("t"), load="eager")

# Values


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


# Mistakes


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.stpes", "4"], "unknown key train.stpes; did you mean train.steps?"),
        (["--train.stpes=4"], "unknown key train.stpes; did you mean train.steps?"),
        (["--steps", "4"], "unknown key steps; did you mean train.steps?"),
        (["--schedule.warmup", "4"],
         "unknown key schedule.warmup; did you mean train.schedule.warmup?"),
        (["--trian.lr", "4"], "unknown key trian.lr; did you mean train.lr?"),
        (["--techer", "t"], "unknown key techer; did you mean teacher?"),
        (["--over-write"], "unknown key over-write; did you mean overwrite?"),
        (["--data.mix.a", "4"], "unknown key data.mix.a; did you mean data.mix?"),
        (["--teacher", "{pth: a}"], "unknown key teacher.pth; did you mean teacher.path?"),
        (["--seed", "1e3"], "seed=1e3 is not valid; expected an integer"),
        (["--seed", "1.0"], "seed=1.0 is not valid; expected an integer"),
        (["--seed", "true"], "seed=true is not valid; expected an integer"),
        (["--seed", "null"], "seed=null is not valid; expected an integer"),
        (["--seed="], "seed='' is not valid; expected an integer"),
        (["--train.lr", "fast"], "train.lr=fast is not valid; expected a number"),
        (["--train.clip", "a\nb"], "train.clip=a b is not valid; expected a number or null"),
        (["--overwrite", "maybe"], "overwrite=maybe is not valid; expected true or false"),
        (["--budget", "some"], "budget=some is not valid; expected all or an integer"),
        (["--teacher.load", "no"], "teacher.load=no is not valid; expected one of lazy, eager"),
        (["--data.weights", "1", "--data.weights", "x"],
         "data.weights=[1, x] is not valid; expected a list of numbers or null"),
        (["--data.path", "[a"], "data.path=[a is not valid; expected a list of paths"),
        (["--data.mix", "{a: b}"],
         "data.mix={a: b} is not valid; expected a mapping of texts to numbers"),
        (["--train.schedule.betas", "[1]"],
         "train.schedule.betas=[1] is not valid; expected a list of a number and a number"),
        (["--train", "5"],
         "train=5 is not valid; "
         "train is a section of train.steps, train.lr, train.clip, train.schedule"),
        (["--seed"], "--seed has no value; give --seed VALUE"),
        (["--seed", "--overwrite"], "--seed has no value; give --seed VALUE"),
        (["--config"], "--config has no value; give --config VALUE"),
        (["stray"], "unexpected argument stray; give keys as --key value (--help lists them)"),
        (["-x", "1"], "unexpected argument -x; give keys as --key value (--help lists them)"),
        (["--", "1"], "unexpected argument --; give keys as --key value (--help lists them)"),
        (["--train.steps", "-1"], "train.steps=-1 is negative; give 0 or more"),
    ],
)  # fmt: skip
def test_mistakes_in_flags(argv, expected):
    assert message("--out", "o", *argv) == expected


def test_missing_keys():
    hint = "on the command line or in the --config file"
    assert message() == f"--out is missing; give it {hint}"
    both = message("--teacher.load", "eager")
    assert both == f"--out and --teacher.path are missing; give them {hint}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {stpes: 4}", "unknown key train.stpes; did you mean train.steps?"),
        ("train: {schedule: {wamrup: 4}}",
         "unknown key train.schedule.wamrup; did you mean train.schedule.warmup?"),
        ("train: {steps: abc}", "train.steps=abc is not valid; expected an integer"),
        ("train: {steps: 1e3}", "train.steps=1e3 is not valid; expected an integer"),
        ("train: {steps: [1]}", "train.steps=[1] is not valid; expected an integer"),
        ("train: {steps: -1}", "train.steps=-1 is negative; give 0 or more"),
        ("seed:", "seed=null is not valid; expected an integer"),
        ("name: {a: b}", "name={a: b} is not valid; expected text or null"),
        ("data: {path: {a: b}}", "data.path=[{a: b}] is not valid; expected a list of paths"),
        ("teacher: [a]",
         "teacher=[a] is not valid; teacher is a section of teacher.path, teacher.load"),
        ("seed: 1\nseed: 2", "line 3: not valid YAML, the key seed is given twice"),
        ("train: [1\nlr: x", "line 3: not valid YAML, expected ',' or ']', but got ':'"),
        ("\tseed: 1", "line 2: not valid YAML, found character '\\t' that cannot start any token"),
        ("name: *nobody", "line 2: not valid YAML, found undefined alias 'nobody'"),
        ("name: \xff", "is not UTF-8 text; give --config a YAML file"),
    ],
)  # fmt: skip
def test_mistakes_in_yaml(tmp_path, text, expected):
    if "negative" in expected:  # a section's own check does not know where its values come from
        with pytest.raises(MinitronError, match=f"^{expected}$"):
            parse_yaml(tmp_path, f"out: o\n{text}\n")
    else:
        assert yaml_message(tmp_path, f"out: o\n{text}\n") == expected


def test_yaml_that_is_no_recipe(tmp_path):
    expected = "holds [a]; a recipe is made of `key: value` lines"
    assert yaml_message(tmp_path, "- a\n") == expected
    assert "special characters are not allowed" in yaml_message(tmp_path, "out: \x00")


def test_config_file_that_cannot_be_read(tmp_path):
    missing = tmp_path / "nope.yaml"
    reason = "cannot be read (No such file or directory); give --config a YAML file"
    assert message("--config", str(missing)) == f"{missing}: {reason}"
    assert "(Is a directory)" in message("--config", str(tmp_path))


# Output


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Recipe, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "Train a small model.",
        "--config YAML",
        "--print_config",
        "--out PATH Output directory. (a path; required)",
        "--seed INT (an integer; default: 1234)",
        "--overwrite [BOOL] (true or false; default: false)",
        "--train.steps INT Optimizer steps; 100% of them. (an integer; default: 10)",
        "--train.lr FLOAT (a number; default: 0.5)",
        "--train.schedule.warmup INT Steps to warm up. (an integer; default: 0)",
        "--data.path PATH (a list of paths; repeatable; default: [])",
        "Optimisation of the run.",
        "Distil from this model. Off unless one of its keys is given. "
        "`--teacher X` is short for `--teacher.path X`.",
        "--teacher.path PATH Its directory. (a path; required)",
        "--teacher.load {lazy,eager} (one of lazy, eager; default: lazy)",
    ):
        assert expected in text
    assert "readers of the code" not in text


def test_print_config_prints_the_resolved_recipe(capsys):
    argv = ["--out", "o", "--train.lr", "1e-5", "--teacher", "t"]
    with pytest.raises(SystemExit) as stop:
        config.parse(Recipe, ["--print_config", *argv])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == config.to_dict(config.parse(Recipe, argv))


@pytest.mark.parametrize("flag", ["--help", "-h", "--print_config"])
def test_only_rank_zero_prints(monkeypatch, capsys, flag):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        config.parse(Recipe, ["--out", "o", flag])
    assert stop.value.code == 0
    assert capsys.readouterr().out == ""


def test_print_config_still_checks():
    assert message("--print_config").startswith("--out is missing")


def test_help_needs_no_torch():
    code = "import sys, minitron.stage, minitron.metrics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_list_takes_several_values_and_commas_between_numbers():
    recipe = parse(
        "--out", "x", "--data.path", "a,b", "c", "--data.drop", "3,4", "--data.path", "d"
    )
    assert recipe.data.path == [Path("a,b"), Path("c"), Path("d")]
    assert recipe.data.drop == (3, 4)
    with pytest.raises(MinitronError, match=r"data.drop=\['3', 'x'\]|data.drop"):
        parse("--out", "x", "--data.drop", "3,x")
