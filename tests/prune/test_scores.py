import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron import artifact
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.prune.scores import (
    AGGREGATIONS,
    SCORES_FILE,
    check_origin,
    check_scores,
    load_scores,
    save_scores,
    top_indices,
)
from tests.prune.scored import random_importance, random_scores
from tests.tiny import save_llama, tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())
NAMES = ("hidden", "ffn", "heads", "query_groups", "block_influence")


@pytest.mark.parametrize("as_file", [False, True])
def test_scores_come_back_as_they_were_saved(tmp_path, as_file):
    importance = random_importance(ARCH)
    save_scores(tmp_path, importance)
    loaded = load_scores(tmp_path / SCORES_FILE if as_file else tmp_path)
    for name in NAMES:
        assert torch.equal(getattr(loaded, name), getattr(importance, name))
    check_scores(loaded.scores(), ARCH)


def test_scores_are_saved_in_fp32_whatever_they_were(tmp_path):
    importance = random_importance(ARCH)
    transposed = importance.ffn.mT.contiguous().mT.double().requires_grad_()
    save_scores(tmp_path, dataclasses.replace(importance, ffn=transposed))
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


def test_damaged_file(tmp_path):
    save_scores(tmp_path, random_importance(ARCH))
    path = tmp_path / SCORES_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MinitronError, match=r"not a readable safetensors file \(.+\); measure"):
        load_scores(tmp_path)


def test_file_of_something_else(tmp_path):
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / SCORES_FILE)
    with pytest.raises(MinitronError, match=r"holds the tensors model.norm.weight, a score file"):
        load_scores(tmp_path)


def test_file_without_aggregations(tmp_path):
    importance = random_importance(ARCH)
    save_scores(tmp_path, dataclasses.replace(importance, heads=importance.heads[1, 0][None, None]))
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
def test_scores_of_another_model_are_refused(tmp_path, as_file, caplog):
    save_llama(tmp_path / "model", seed=0)
    save_llama(tmp_path / "other", seed=1)
    directory = tmp_path / "scores"
    directory.mkdir()
    save_scores(directory, random_importance(ARCH))
    path = directory / SCORES_FILE if as_file else directory
    with caplog.at_level("INFO"):
        check_origin(path, tmp_path / "other")
    assert caplog.messages == [
        f"{directory} does not say which model its scores are of; if they are not of "
        f"{tmp_path / 'other'}, they prune at random: keep their manifest.json beside them"
    ]
    caplog.clear()
    artifact.write_manifest(
        directory, stage="importance", recipe={}, parents={"model": tmp_path / "model"}
    )
    with caplog.at_level("INFO"):
        check_origin(path, tmp_path / "model")
    assert not caplog.messages
    with pytest.raises(MinitronError) as caught:
        check_origin(path, tmp_path / "other")
    message = str(caught.value)
    assert message.startswith("scores belong to another model: ")
    for directory in (tmp_path / "model", tmp_path / "other"):
        assert str(directory) in message
        assert artifact.fingerprint(directory) in message


def test_scores_of_a_large_model_of_the_same_shape_are_refused(tmp_path):
    for seed, name in enumerate(("model", "same", "other")):
        save_llama(tmp_path / name, seed=seed // 2, vocab_size=8192)
        assert (tmp_path / name / "model.safetensors").stat().st_size > 1 << 20
    directory = tmp_path / "scores"
    directory.mkdir()
    save_scores(directory, random_importance(ARCH))
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
