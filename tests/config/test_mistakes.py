"""What is wrong with a recipe, and what `--help` says of it."""

import subprocess
import sys

import pytest
import yaml

from minitron import config
from minitron.errors import MinitronError
from tests.config.recipe import Recipe, message, parse_yaml, yaml_message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.stpes", "4"], "unknown key train.stpes; did you mean train.steps?"),
        (["--train.stpes=4"], "unknown key train.stpes; did you mean train.steps?"),
        (["--steps", "4"], "unknown key steps; did you mean train.steps?"),
        (["--schedule.warmup", "4"],
         "unknown key schedule.warmup; did you mean train.schedule.warmup?"),
        (["--trian.lr", "4"], "unknown key trian.lr; did you mean train.lr?"),
        (["--grid.sizes", "4"],
         "unknown key grid.sizes; there are out, seed, overwrite, name, budget, train, data, "
         "teacher (--help explains them)"),
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
        ("\tseed: 1", "line 2: not valid YAML, a tab; indent with spaces"),
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
