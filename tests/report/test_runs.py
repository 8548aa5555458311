"""Reading run directories, also unfinished and damaged ones."""

import numpy as np
import pytest

from minitron.errors import MinitronError
from minitron.report.runs import read_runs
from tests.report.run_dirs import evaluation, score_directory, training_run, write_manifest


def test_training_and_validation_lines_become_columns(tmp_path):
    (run,) = read_runs([training_run(tmp_path / "width", [3.0, 2.0, 1.5], kl=0.25)])
    assert run.name == "width"
    assert run.training["loss"].tolist() == [2.0, 1.5]
    assert run.training["kl"].tolist() == [0.25, 0.25]
    assert run.validation["val_loss"].tolist() == [3.0, 2.0, 1.5]
    assert run.validation["tokens"].tolist() == [0, 10, 20]
    assert run.num_parameters == 4_512_746_496


def test_null_and_missing_values_are_nan(tmp_path):
    (run,) = read_runs([training_run(tmp_path / "run", [3.0, None])])
    assert np.isnan(run.training["loss"]).all()
    assert np.isnan(run.training["kl"]).all()


def test_half_written_last_line_is_ignored(tmp_path):
    path = training_run(tmp_path / "run", [3.0, 2.0])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run,) = read_runs([path])
    assert run.training["step"].tolist() == [1]


def test_damaged_line_in_the_middle_is_refused(tmp_path):
    path = training_run(tmp_path / "run", [3.0, 2.0])
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", *lines[1:]]))
    with pytest.raises(MinitronError, match=r"metrics\.jsonl line 2 .*delete that line"):
        read_runs([path])


@pytest.mark.parametrize("stage", ["train", "distill"])
def test_run_without_manifest_is_unfinished(tmp_path, stage):
    (run,) = read_runs([training_run(tmp_path / "run", [3.0, 2.0], stage=stage, finished=False)])
    assert run.status == f"{stage}, unfinished"
    assert run.recipe["train"] == {"steps": 1}


def test_empty_metrics_are_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (run,) = read_runs([tmp_path])
    assert run.training is None
    assert run.validation is None


def test_names_are_as_long_as_it_takes_to_differ(tmp_path):
    paths = [tmp_path / name for name in ("a/student", "b/student", "teacher")]
    for path in paths:
        write_manifest(path, "train")
    runs = read_runs([*paths, paths[0]])  # the same directory twice is one run
    assert [run.name for run in runs] == ["a/student", "b/student", "teacher"]


def test_relative_and_absolute_path_of_one_run_is_one_run(tmp_path, monkeypatch):
    write_manifest(tmp_path / "run", "train")
    monkeypatch.chdir(tmp_path / "run")
    assert [run.name for run in read_runs([tmp_path / "run", tmp_path / "run" / "."])] == ["run"]


def test_evaluation_and_scores(tmp_path):
    eval_run, score_run = read_runs(
        [evaluation(tmp_path / "eval", 2.5), score_directory(tmp_path / "scores", layers=5)]
    )
    assert eval_run.evaluation["lm_loss"] == 2.5
    assert score_run.scores["block_influence"].shape == (5,)


def test_losses_compare_by_the_data_they_were_measured_on(tmp_path):
    some = {"valid_path": ["valid.bin"], "valid_samples": 1024, "seq_length": 64}
    training, same, longer, fewer = read_runs(
        [
            training_run(tmp_path / "a", [3.0, 2.0]),
            evaluation(tmp_path / "b", 2.5, path=["valid.bin"], seq_length=64),
            evaluation(tmp_path / "c", 2.5, path=["valid.bin"], seq_length=4096),
            training_run(tmp_path / "d", [3.0, 2.0], data=some),
        ]
    )
    assert training.validation_data == same.validation_data == "valid.bin, sequences of 64"
    assert longer.validation_data == "valid.bin, sequences of 4,096"
    assert fewer.validation_data == "the first 1,024 samples of valid.bin, sequences of 64"


def test_what_is_no_run_directory_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(MinitronError, match="file is not a directory; give the --out"):
        read_runs([file])
    with pytest.raises(MinitronError, match=r"neither manifest\.json nor metrics\.jsonl"):
        read_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "manifest.json is not valid JSON"),
        ("manifest.json", "[]", "manifest.json does not hold a JSON object"),
        ("eval.json", '{"lm_loss": 2.0}', "eval.json lacks perplexity, tokens; run eval.py again"),
        ("scores.safetensors", "nonsense", "scores.safetensors is damaged .*run importance.py"),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content, message):
    write_manifest(tmp_path, "eval")
    (tmp_path / name).write_text(content)
    with pytest.raises(MinitronError, match=message) as error:
        read_runs([tmp_path])
    assert "\n" not in str(error.value)


def test_damaged_recipe_of_an_unfinished_run_is_named(tmp_path):
    path = training_run(tmp_path / "run", [3.0, 2.0], finished=False)
    (path / "recipe.yaml").write_text("a: [1\nb")
    with pytest.raises(MinitronError, match=r"recipe\.yaml is not valid YAML") as error:
        read_runs([path])
    assert "\n" not in str(error.value)


def test_score_file_without_a_tensor_is_refused(tmp_path):
    from safetensors.numpy import save_file

    write_manifest(tmp_path, "importance")
    save_file({"hidden": np.ones((2, 4), np.float32)}, tmp_path / "scores.safetensors")
    with pytest.raises(MinitronError, match="lacks ffn, heads, block_influence"):
        read_runs([tmp_path])
