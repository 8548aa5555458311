import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron import artifact
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.prune.scores import (
    AGGREGATIONS,
    SCORES_FILE,
    Calibration,
    check_origin,
    check_scores,
    load_scores,
    save_scores,
    top_indices,
)
from tests.prune.scored import random_importance, random_scores, save_random
from tests.tiny import save_llama, tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())
NAMES = ("hidden", "ffn", "heads", "query_groups", "block_influence")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_llama(directory)
    return directory


@pytest.mark.parametrize("as_file", [False, True])
def test_scores_come_back_as_they_were_saved(tmp_path, model, as_file):
    importance = save_random(tmp_path, model)
    loaded = load_scores(tmp_path / SCORES_FILE if as_file else tmp_path)
    for name in NAMES:
        assert torch.equal(getattr(loaded, name), getattr(importance, name))
    check_scores(loaded.scores(), ARCH)


def test_scores_are_saved_in_fp32_whatever_they_were(tmp_path, model):
    importance = random_importance(ARCH)
    transposed = importance.ffn.mT.contiguous().mT.double().requires_grad_()
    save_random(tmp_path, model, dataclasses.replace(importance, ffn=transposed))
    stored = load_file(tmp_path / SCORES_FILE)
    assert stored.keys() == {*NAMES, "hidden_total"}
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert torch.equal(stored["ffn"], importance.ffn)
    torch.testing.assert_close(stored["hidden_total"], importance.hidden.sum(2))


def test_an_aggregation_is_chosen_from_the_stored_ones():
    importance = random_importance(ARCH)
    assert torch.equal(importance.scores().ffn, importance.ffn[1, 0])
    for i, batch in enumerate(AGGREGATIONS):
        for j, sequence in enumerate(AGGREGATIONS):
            scores = importance.scores(batch, sequence)
            for name in NAMES[:-1]:
                assert torch.equal(getattr(scores, name), getattr(importance, name)[i, j])
            assert torch.equal(scores.block_influence, importance.block_influence)


def test_missing_file(tmp_path):
    with pytest.raises(MinitronError, match=r"scores.safetensors does not exist; launch/importanc"):
        load_scores(tmp_path)
    with pytest.raises(MinitronError, match="absent does not exist"):
        load_scores(tmp_path / "absent")


def test_damaged_file(tmp_path, model):
    save_random(tmp_path, model)
    path = tmp_path / SCORES_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MinitronError, match=r"not a readable safetensors file \(.+\); measure"):
        load_scores(tmp_path)
    with pytest.raises(MinitronError, match=r"not a readable safetensors file \(.+\); measure"):
        check_origin(tmp_path, model)


def test_file_of_something_else(tmp_path):
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / SCORES_FILE)
    with pytest.raises(MinitronError, match=r"holds the tensors model.norm.weight, a score file"):
        load_scores(tmp_path)


def test_file_without_aggregations(tmp_path, model):
    importance = random_importance(ARCH)
    single = dataclasses.replace(importance, heads=importance.heads[1, 0][None, None])
    save_random(tmp_path, model, single)
    with pytest.raises(MinitronError, match=r"heads has shape \[1, 1, 4, 8\], not \[3, 3, layers"):
        load_scores(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_size_of_another_model(name):
    scores = random_scores(ARCH)
    wrong = dataclasses.replace(scores, **{name: getattr(scores, name)[..., :-1]})
    shape = list(getattr(scores, name).shape)
    found = [*shape[:-1], shape[-1] - 1]
    with pytest.raises(MinitronError) as caught:
        check_scores(wrong, ARCH)
    assert f"scores.{name} has shape {found}, the model needs {shape}" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(name, value):
    scores = random_scores(ARCH)
    getattr(scores, name)[2, ...].view(-1)[0] = value
    where = "" if name == "block_influence" else " of layer 3"
    with pytest.raises(MinitronError, match=f"scores.{name}{where} are not finite; the model or"):
        check_scores(scores, ARCH)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_hook_that_never_fired(name):
    scores = random_scores(ARCH)
    getattr(scores, name)[... if name == "block_influence" else 1] = 0.0
    where = "" if name == "block_influence" else " of layer 2"
    with pytest.raises(MinitronError, match=f"scores.{name}{where} are all zero"):
        check_scores(scores, ARCH)


def test_single_zeros_are_scores_too():
    scores = random_scores(ARCH)
    scores.ffn[0, 0] = scores.block_influence[1] = 0.0
    check_scores(scores, ARCH)


@pytest.mark.parametrize("as_file", [False, True])
def test_scores_of_another_model_are_refused(tmp_path, model, as_file):
    """By their file alone, and by the manifest beside it."""
    save_llama(tmp_path / "other", seed=1)
    fingerprints = [artifact.fingerprint(path) for path in (model, tmp_path / "other")]
    directory = tmp_path / "scores"
    directory.mkdir()
    save_random(directory, model)
    path = directory / SCORES_FILE if as_file else directory
    for name in ("another", str(model)):
        check_origin(path, model)
        with pytest.raises(MinitronError) as caught:
            check_origin(path, tmp_path / "other")
        assert str(caught.value) == (
            f"scores belong to another model: {path} was measured on {name} ({fingerprints[0]}), "
            f"not on {tmp_path / 'other'} ({fingerprints[1]}); measure the importance of this model"
        )
        artifact.write_manifest(directory, stage="importance", recipe={}, parents={"model": model})


def test_a_file_of_another_model_under_a_manifest_of_this_one(tmp_path, model):
    save_llama(tmp_path / "other", seed=1)
    (tmp_path / "scores").mkdir()
    save_random(tmp_path / "scores", tmp_path / "other")
    artifact.write_manifest(
        tmp_path / "scores", stage="importance", recipe={}, parents={"model": model}
    )
    with pytest.raises(MinitronError, match="scores belong to another model"):
        check_origin(tmp_path / "scores", model)


def test_scores_that_do_not_say_what_they_are_of_are_refused(tmp_path, model):
    """Unless a manifest does, as beside those of older versions."""
    save_random(tmp_path, model)
    save_file(load_file(tmp_path / SCORES_FILE), tmp_path / SCORES_FILE)
    with pytest.raises(MinitronError) as caught:
        check_origin(tmp_path, model)
    assert str(caught.value) == (
        f"{tmp_path} does not say which model its scores are of; restore their manifest.json, or "
        f"measure the importance of {model}"
    )
    artifact.write_manifest(tmp_path, stage="importance", recipe={}, parents={"model": model})
    check_origin(tmp_path, model)


def test_equal_scores_are_equal_files_wherever_what_they_are_of_lies(tmp_path, model):
    """The header names samples, tokenizer and data beside the model."""
    shutil.copytree(model, tmp_path / "copy")
    files = []
    for number, path in enumerate((model, tmp_path / "copy")):
        calibration = Calibration(samples=3, tokenizer="t", data={f"data{number}": "d"})
        save_scores(tmp_path, random_importance(ARCH), model_dir=path, calibration=calibration)
        files.append((tmp_path / SCORES_FILE).read_bytes())
    assert files[0] == files[1]
    with safe_open(tmp_path / SCORES_FILE, "pt") as opened:
        measured_on = json.loads(opened.metadata()["measured_on"])
    fingerprint = artifact.fingerprint(model)
    assert measured_on == {"model": fingerprint, "tokenizer": "t", "data": ["d"], "samples": 3}


def test_scores_of_a_large_model_of_the_same_shape_are_refused(tmp_path):
    for seed, name in enumerate(("model", "same", "other")):
        save_llama(tmp_path / name, seed=seed // 2, vocab_size=8192)
        assert (tmp_path / name / "model.safetensors").stat().st_size > 1 << 20
    directory = tmp_path / "scores"
    directory.mkdir()
    save_random(directory, tmp_path / "model")
    artifact.write_manifest(
        directory, stage="importance", recipe={}, parents={"model": tmp_path / "model"}
    )
    check_origin(directory, tmp_path / "same")
    with pytest.raises(MinitronError, match="scores belong to another model"):
        check_origin(directory, tmp_path / "other")


def test_top_indices_against_sorting_by_hand():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (5, 3, 20), generator=generator).float()  # full of ties
    for count in (1, 7, 20):
        found = top_indices(scores, count)
        for i in range(5):
            for j in range(3):
                row = scores[i, j].tolist()
                best = sorted(range(20), key=lambda k: (-row[k], k))[:count]
                assert found[i, j].tolist() == sorted(best)


@pytest.mark.parametrize("count", [0, 5])
def test_top_indices_of_an_impossible_number(count):
    with pytest.raises(ValueError, match=f"cannot keep {count} of 4"):
        top_indices(torch.rand(4), count)
