"""launch/search.py goes on where it died, with the same recipe only."""

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron import artifact
from minitron.errors import MinitronError
from minitron.search.trials import Trials
from minitron.train.loop import Trainer
from tests.launch.search.searching import call, read
from tests.runs import Crash


@pytest.mark.parametrize("point", ["pruned", "training", "between", "writing"])
def test_a_search_that_dies_goes_on(inputs, searched, tmp_path, monkeypatch, point):
    owner, method, calls = {
        "pruned": (Trials, "pruned_loss", 2),
        "training": (Trainer, "train_step", 8),  # past a checkpoint, before a rung
        "between": (Trials, "train", 4),
        "writing": (Trials, "save", 0),
    }[point]
    original, left = getattr(owner, method), [calls]

    def dying(*args, **kwargs):
        if not left[0]:
            raise Crash
        left[0] -= 1
        return original(*args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dying)
        with pytest.raises(Crash):
            call("search", *inputs[-1], "--out", out)
    assert not (out / "manifest.json").exists()
    assert "| pruned |" in (out / "search.md").read_text()  # how far it came
    assert (out / "ranking.svg").exists() or point in ("pruned", "training")
    done = [c for c in read(out)["candidates"] if c["pruned_loss"] is not None]
    measured = []
    monkeypatch.setattr(
        Trials,
        "pruned_loss",
        lambda self, arch, original=Trials.pruned_loss: (
            measured.append(arch) or original(self, arch)
        ),
    )
    call("search", *inputs[-1], "--out", out, "--resume")
    assert len(measured) == 4 - len(done)
    assert read(out) == read(searched)
    best = [LlamaForCausalLM.from_pretrained(d / "best").state_dict() for d in (out, searched)]
    assert all(torch.equal(best[0][name], tensor) for name, tensor in best[1].items())
    artifact.verify(out)

    call("search", *inputs[-1], "--out", out, "--resume")  # nothing is left to do
    assert len(measured) == 4 - len(done)
    assert read(out) == read(searched)


@pytest.mark.parametrize(
    ("flag", "value", "change"),
    [
        ("--race.entrants", 2, "race.entrants: 3 -> 2"),
        ("--train.lr", 0.5, "train.lr: 0.003 -> 0.5"),
    ],
)
def test_another_recipe_is_not_resumed(inputs, searched, monkeypatch, flag, value, change):
    monkeypatch.setattr("minitron.model.llama.LlamaModel.__init__", None)  # nothing is built for it
    with pytest.raises(MinitronError) as caught:
        call("search", *inputs[-1], flag, value, "--out", searched, "--resume")
    assert str(caught.value) == (
        f"--resume would continue a run with another recipe than {searched / 'recipe.yaml'}: "
        f"{change}; take the old values or another --out"
    )
