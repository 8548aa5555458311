"""launch/chain.py: steps of scoring, pruning and distilling from one recipe."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from minitron import artifact, config
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.train.made import count_complete
from tests.harness import run_distributed
from tests.launch.launcher import LAUNCH
from tests.launch.search.searching import call
from tests.runs import SEQ_LENGTH, VOCAB, Crash, load_tensors, write_tokens
from tests.tiny import save_llama

MID = {"prune.hidden_size": 24, "prune.ffn_hidden_size": 40}
SMALL = {"hidden_size": 16, "num_layers": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, data, and the recipe of a chain: a model in between, then two rounds without it."""
    root = tmp_path_factory.mktemp("chain")
    save_llama(root / "model", vocab_size=VOCAB)
    data = {"path": [str(write_tokens(root / "tokens", 9 * SEQ_LENGTH))], "seq_length": SEQ_LENGTH}
    recipe = {
        "model": str(root / "model"),
        "importance": {"data": data, "importance.samples": 4},
        "prune": {"check.samples": 4},
        "distill": {
            "teacher": {"path": str(root / "model"), "allow_untrained": True},  # it is random
            "data": data | {"valid_path": data["path"]},
            "train": {"steps": 2, "lr": 1e-3, "adam_eps": 1e-6, "global_batch_size": 2},
        },
        "steps": {
            "mid": {"prune": MID, "distill": {"train.lr": 3e-3}},
            "small": {"prune": {"prune": {**SMALL, "rounds": 2}}, "distill": None},
        },
    }
    write(recipe, root / "chain.yaml")
    return root


def write(recipe, path):
    path.write_text(json.dumps(recipe))


def edited(root, path, **changes):
    """A copy of the recipe with other sections."""
    write(json.loads((root / "chain.yaml").read_text()) | changes, path)
    return path


def load_chain():
    spec = importlib.util.spec_from_file_location("launch_chain", LAUNCH / "chain.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(*arguments):
    chain = load_chain()
    recipe = config.parse(chain.Recipe, list(map(str, arguments)))
    return chain.plan(recipe, hf.read_architecture(recipe.model.path))


def shapes(out, names):
    configs = [LlamaForCausalLM.from_pretrained(out / name).config for name in names]
    return [(c.hidden_size, c.intermediate_size, c.num_hidden_layers) for c in configs]


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    call("chain", "--config", root / "chain.yaml", "--out", out)
    return out


def test_a_chain_makes_what_its_stages_make_by_hand(root, made, tmp_path):
    model, tokens = root / "model", root / "tokens"
    data = ("--data.path", tokens, "--data.seq_length", SEQ_LENGTH)

    def shrink(model, name, *sizes):
        scores, pruned = tmp_path / f"{name}_scores", tmp_path / f"{name}_pruned"
        call("importance", "--model", model, *data, "--importance.samples", 4, "--out", scores)
        call(
            "prune", "--model", model, "--scores", scores, *sizes, "--check.samples", 0,
            "--out", pruned,
        )  # fmt: skip
        return pruned

    sizes = ("--prune.hidden_size", 24, "--prune.ffn_hidden_size", 40)
    call(
        "distill", "--teacher", model, "--teacher.allow_untrained", *data,
        "--student", shrink(model, "mid", *sizes), "--data.valid_path", tokens,
        "--train.steps", 2, "--train.lr", 3e-3, "--train.global_batch_size", 2,
        "--train.adam_eps", 1e-6, "--out", tmp_path / "mid",
    )  # fmt: skip
    sizes = ("--prune.hidden_size", 16, "--prune.num_layers", 2)
    first = shrink(tmp_path / "mid", "first", *sizes, "--prune.rounds", 2)
    second = shrink(first, "second", *sizes)
    parts = ("mid/distilled", "small-1/pruned", "small-2/pruned")
    assert shapes(made, parts) == [(24, 40, 4), (24, 40, 3), (16, 40, 2)]
    for part, by_hand in zip(parts, (tmp_path / "mid", first, second), strict=True):
        ours, theirs = load_tensors(made / part), load_tensors(by_hand)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    artifact.verify(made)
    manifest = artifact.read_manifest(made)
    assert manifest["metrics"]["student"] == str(made / "small-2/pruned")
    assert not (made / "small-1" / "distilled").exists()


def _on_two_ranks(*arguments):
    call("chain", *arguments, "--parallel.tensor_model_parallel_size", 2)
    return dist.get_rank()


def test_ranks_do_not_change_the_models(root, made, tmp_path):
    out = tmp_path / "out"
    run_distributed(_on_two_ranks, 2, "--config", root / "chain.yaml", "--out", out)
    ours, theirs = load_tensors(made / "mid/pruned"), load_tensors(out / "mid/pruned")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    found = artifact.read_manifest(out / "mid" / "distilled")["metrics"]["val_loss"]
    expected = artifact.read_manifest(made / "mid" / "distilled")["metrics"]["val_loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert shapes(out, ["small-2/pruned"]) == [(16, 40, 2)]


def test_shapes_can_be_listed(root, made, tmp_path, capsys):
    call("chain", "--config", root / "chain.yaml", "--out", tmp_path / "out", "--list_only")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:6]]
    assert [row[:2] for row in rows[1:]] == [
        ["mid", "L4-h24-f40-n8-g2"],
        ["small-1", "L3-h24-f40-n8-g2"],
        ["small-2", "L2-h16-f40-n8-g2"],
    ]
    assert rows[1][-2:] == ["-", "-"]
    assert not (tmp_path / "out").exists()
    call("chain", "--config", root / "chain.yaml", "--out", made, "--list_only")
    pruned, distilled = capsys.readouterr().out.splitlines()[3].split()[-2:]
    metrics = artifact.read_manifest(made / "mid" / "distilled")["metrics"]
    assert distilled == f"{metrics['val_loss']:.4f}" != pruned


def test_keys_of_stages_may_be_given_on_the_command_line(root, tmp_path):
    flags = ("--distill.train.steps", 7, "--steps.mid.distill.train.steps", 9)
    flags += ("--steps.small.distill.train.lr", 0.5, "--importance.data.path", "a", "b")
    mid, *small = plan("--config", root / "chain.yaml", "--out", tmp_path, *flags)
    train = [step.stages[-1].recipe.train for step in (mid, *small)]
    assert [(t.steps, t.lr) for t in train] == [(9, 3e-3), (7, 0.5), (7, 0.5)]
    assert mid.stages[0].recipe.data.path == ["a", "b"]
    with pytest.raises(
        MinitronError, match=r"^steps.mid: launch/distill.py: unknown key train.stepz"
    ):
        plan("--config", root / "chain.yaml", "--out", tmp_path, "--distill.train.stepz", 7)


def test_a_round_that_rounds_to_no_change_is_left_out(root, tmp_path, caplog):
    save_llama(tmp_path / "model", vocab_size=VOCAB, num_key_value_heads=8, num_hidden_layers=1)
    small = {"prune": {"prune": {"num_query_groups": 2, "rounds": 4}}, "distill": None}
    path = edited(root, tmp_path / "chain.yaml", steps={"small": small})
    with caplog.at_level("INFO"):
        steps = plan("--config", path, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert [(step.name, step.arch.num_query_groups) for step in steps] == [
        ("small-3", 4), ("small-4", 2),
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        f"steps.small: round {number} changes nothing, and is left out" for number in (1, 2)
    ]
    scoring, pruning = (stage.recipe for stage in steps[0].stages)
    assert (scoring.model.path, pruning.prune.rounds) == (tmp_path / "model", 2)


@pytest.mark.parametrize(
    ("ranking", "tried"),
    [
        ("block_influence", {}),
        ("lm_loss", {"depth.greedy": 1}),  # the trials of its first step
        ("window", {"depth.windows": [1, 2]}),
        ("greedy", {"depth.greedy": 3}),
        ("accuracy", {"depth.layers": True, "tasks.names": ["winogrande"]}),
    ],
)
def test_a_ranking_needs_no_more_than_its_own_trials(root, tmp_path, ranking, tried):
    deep = {"prune": {"prune.num_layers": 2, "prune.layer_ranking": ranking}, "importance": tried}
    wide = {"prune": {"prune.hidden_size": 16, "prune.layer_ranking": "window"}}  # drops no layer
    path = edited(root, tmp_path / "chain.yaml", steps={"deep": deep, "wide": wide})
    steps = plan("--config", path, "--out", tmp_path / "out")
    assert [step.arch.num_layers for step in steps] == [2, 2]


class Stages:
    """Stands in for the stages: logs them, writes their manifests, and fails when it is told to."""

    def __init__(self, monkeypatch):
        self.chain = load_chain()
        self.started, self.fails = [], None
        scripts = {name: self.chain.script(name) for name in ("importance", "prune", "distill")}
        stand_ins = {
            name: SimpleNamespace(Recipe=module.Recipe, main=self._main(name))
            for name, module in scripts.items()
        }
        monkeypatch.setattr(self.chain, "script", stand_ins.__getitem__)

    def _main(self, name):
        roles = {"distill": ("teacher", "student"), "prune": ("model", "scores")}

        def main(recipe):
            self.started.append("/".join(recipe.out.parts[-2:]))
            if self.started[-1] == self.fails:
                raise Crash
            recipe.out.mkdir(parents=True)
            (recipe.out / "content").write_text(str(recipe.out))
            artifact.write_manifest(
                recipe.out,
                stage=name,
                recipe=config.to_dict(recipe),
                parents={role: getattr(recipe, role).path for role in roles.get(name, ("model",))},
            )

        return main

    def run(self, *arguments):
        self.started.clear()
        try:
            self.chain.main(config.parse(self.chain.Recipe, list(map(str, arguments))))
        finally:
            dist.destroy_process_group()
        return list(self.started)


STAGES = [
    "mid/scores", "mid/pruned", "mid/distilled", "small-1/scores", "small-1/pruned",
    "small-2/scores", "small-2/pruned",
]  # fmt: skip


def test_it_goes_on_where_it_was_stopped(root, tmp_path, monkeypatch):
    stages = Stages(monkeypatch)
    for stopped in ("mid/distilled", "small-2/pruned"):
        number = STAGES.index(stopped)
        out = tmp_path / str(number)
        arguments = ("--config", root / "chain.yaml", "--out", out)
        stages.fails = stopped
        with pytest.raises(Crash):
            stages.run(*arguments)
        assert stages.started == STAGES[: number + 1]
        assert not (out / "manifest.json").exists()
        stages.fails = None
        with pytest.raises(MinitronError, match=r"is not empty \(it holds .*add --overwrite"):
            stages.run(*arguments)
        assert stages.run(*arguments, "--resume") == STAGES[number:]
        assert stages.run(*arguments, "--resume") == []
    assert stages.run(*arguments, "--overwrite") == STAGES


def test_only_what_is_complete_is_bound_to_its_recipe(root, tmp_path, monkeypatch):
    stages, out = Stages(monkeypatch), tmp_path / "out"
    stages.fails = "small-1/scores"
    with pytest.raises(Crash):
        stages.run("--config", root / "chain.yaml", "--out", out)
    stages.fails = None
    steps = json.loads((root / "chain.yaml").read_text())["steps"]
    small = {"small": {"prune": {"prune.hidden_size": 8}}}
    mid = {"mid": {"prune": {**MID, "prune.hidden_size": 16}}}

    other = edited(root, tmp_path / "a.yaml", steps=steps | mid)
    with pytest.raises(MinitronError) as caught:
        stages.run("--config", other, "--out", out, "--resume")
    assert str(caught.value) == (
        f"{out}/mid/pruned is complete, and was made with another recipe: prune.hidden_size: 24 -> "
        f"16; take the old values, delete {out}/mid/pruned and what follows from it, or choose "
        "another --out"
    )
    other = edited(root, tmp_path / "b.yaml", steps=steps | small)
    ranks = ("--parallel.timeout_minutes", 5)  # may be others all the same
    assert stages.run("--config", other, "--out", out, "--resume", *ranks) == [
        "small/scores", "small/pruned", "small/distilled",
    ]  # fmt: skip


def test_what_is_complete_has_to_follow_from_what_is_there(root, tmp_path, monkeypatch):
    stages, out = Stages(monkeypatch), tmp_path / "out"
    shutil.copytree(root / "model", tmp_path / "model")
    arguments = (
        "--config", root / "chain.yaml", "--model", tmp_path / "model", "--out", out, "--resume",
    )  # fmt: skip
    stages.run(*arguments)
    shutil.rmtree(out / "mid" / "pruned")
    with pytest.raises(MinitronError) as caught:
        stages.run(*arguments)
    assert str(caught.value) == (
        f"{out}/mid/distilled is complete, but {out}/mid/pruned, which it was made of, is not; "
        "restore that, or delete what follows from it"
    )
    for part in STAGES[2:]:
        shutil.rmtree(out / part)
    assert stages.run(*arguments) == STAGES[1:]
    (tmp_path / "model" / "config.json").write_text(
        (tmp_path / "model" / "config.json").read_text() + "\n"
    )
    with pytest.raises(MinitronError) as caught:
        stages.run(*arguments)
    assert str(caught.value) == (
        f"{out}/mid/scores is complete, and was made of another model than {tmp_path}/model holds "
        f"now; delete {out}/mid/scores and what follows from it, or choose another --out"
    )
    assert stages.started == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": {}}, "the chain has no steps; give one or more in the section steps"),
        ({"steps": "4b"}, "steps=4b is not valid; expected a mapping of keys"),
        ({"steps": {"a/b": {"prune": MID}}}, "steps.a/b names a directory below out; use another"),
        ({"steps": {"a": {"prune": MID, "train": {}}}}, "steps.a: unknown key train; there are "),
        ({"steps": {"a": {"distill": {}}}}, "steps.a: --prune is missing; give it"),
        ({"steps": {"a": MID}}, "steps.a: launch/prune.py: unknown key hidden_size; did you mean"),
        (
            {"steps": {"a": {"prune": {"hidden_size": 24}}}},
            "steps.a: launch/prune.py: unknown key hidden_size; did you mean prune.hidden_size?",
        ),
        (
            {"steps": {"a": {"prune": {}}}},
            "steps.a: launch/prune.py: nothing to prune; give at least one of prune.hidden_size, ",
        ),
        (
            {"distill": {"train": {"stepz": 4}}},
            "steps.mid: launch/distill.py: unknown key train.stepz; did you mean train.steps?",
        ),
        (
            {"importance": {}},
            "steps.mid: launch/importance.py: --data.path is missing; give it on",
        ),
        (
            {"steps": {"a": {"prune": {**MID, "out": "there"}}}},
            "steps.a: prune.out is for the chain to fill in; leave it out",
        ),
        (
            {"steps": {"a": {"prune": MID}, "b": {"prune": {"prune.hidden_size": 32}}}},
            "steps.b: prune.hidden_size=32, but the model has 24; choose 1 to 24",
        ),
        (
            {"steps": {"a": {"prune": MID}, "b": {"prune": {"prune.hidden_size": 24}}}},
            "steps.b: L4-h24-f40-n8-g2 is the shape of the model before; give another",
        ),
        (
            {"steps": {"a": {"prune": {"prune": {
                "ffn_hidden_size": 45, "multiple": 16, "rounds": 2
            }}}}},
            "steps.a: L4-h32-f48-n8-g2 is the shape of the model before (ffn_hidden_size: 48 to 45 "
            "in 2 rounds, now 46 -> 48, a multiple of 16 = 16 x 1 ranks); give another",
        ),
        (
            {"steps": {"a": {"distill": None, "prune": {"prune.ffn_hidden_size": 41}}},
             "parallel": {"tensor_model_parallel_size": 2}},
            "steps.a: ffn_hidden_size=41 is not divisible by parallel.tensor_model_parallel_size=2",
        ),
        (
            {"steps": {"a": {"prune": {**MID, "data": {"path": ["there"], "seq_length": 4096}}}}},
            "steps.a: data.seq_length=4096",
        ),
        (
            {"steps": {"a-1": {"prune": MID}, "a": {"prune": {"prune": {**SMALL, "rounds": 2}}}}},
            "steps.a: there is a step a-1 before; use another name",
        ),
        (
            {"steps": {"a": {"prune": {"prune.num_layers": 2, "prune.layer_ranking": "window"}}}},
            "steps.a: prune.prune.layer_ranking=window needs trials; give --importance.depth.windo",
        ),
        *(
            (
                {
                    "steps": {"a": {
                        "prune": {"prune.num_layers": 2, "prune.layer_ranking": ranking},
                        "importance": tried,
                    }}
                },
                f"steps.a: prune.prune.layer_ranking={ranking} needs trials; give --importance."
                f"{missing}",
            )
            for ranking, tried, missing in (
                ("window", {"depth": {"layers": True, "windows": [1, 3]}}, "depth.windows 2"),
                ("lm_loss", {"depth.windows": [2]}, "depth.layers"),
                ("greedy", {"depth": {"layers": True, "greedy": 1}}, "depth.greedy 2"),
                ("accuracy", {"depth.layers": True}, "tasks.names"),
                ("window_accuracy", {"depth.windows": [2]}, "tasks.names"),
            )
        ),
        (
            {"steps": {"a": {"prune": {**MID, "prune.ffn_hidden_size": 41}}}, "parallel": {
                "tensor_model_parallel_size": 2
            }},
            "steps.a: ffn_hidden_size=41 is not divisible by parallel.tensor_model_parallel_size=2",
        ),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(root, tmp_path, changes, message):
    path = edited(root, tmp_path / "chain.yaml", **changes)
    with pytest.raises(MinitronError) as caught:
        plan("--config", path, "--out", tmp_path / "out")
    text = str(caught.value).removeprefix(f"{path}: ")
    assert text.startswith(message)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--distill.data.path", "none"), r"launch/distill.py: none does not exist; "),
        (("--distill.teacher.path", "none"), r"launch/distill.py: --teacher.path none does not ex"),
        (
            ("--distill.train.global_batch_size", 3, "--distill.train.micro_batch_size", 2),
            r"launch/distill.py: train.global_batch_size=3 is not a multiple of ",
        ),
        (
            ("--distill.parallel.tensor_model_parallel_size", 2),
            r"launch/distill.py: the number of ranks, 1, does not divide",
        ),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_the_first(
    root, tmp_path, monkeypatch, flags, message
):
    stages, out = Stages(monkeypatch), tmp_path / "out"
    with pytest.raises(MinitronError, match=f"^steps.mid: {message}"):
        stages.run("--config", root / "chain.yaml", *flags, "--out", out)
    assert (stages.started, out.exists()) == ([], False)


def test_an_earlier_step_may_teach(root, tmp_path, monkeypatch):
    stages, out = Stages(monkeypatch), tmp_path / "out"
    steps = json.loads((root / "chain.yaml").read_text())["steps"]
    steps["small"] = {"prune": {"prune.num_layers": 2}}
    path = edited(root, tmp_path / "chain.yaml", steps=steps)
    arguments = ("--config", path, "--out", out, "--steps.small.distill.teacher.path")
    with pytest.raises(MinitronError, match=r"^steps.small: .*path .*/mid/scores does not exist"):
        stages.run(*arguments, out / "mid/scores")
    assert stages.run(*arguments, out / "mid/distilled")[-1] == "small/distilled"


def test_other_content_of_data_is_refused(root, made):
    steps = plan("--config", root / "chain.yaml", "--out", made)
    recipes = [stage.recipe for step in steps for stage in step.stages]
    file, remedy = root / "tokens.bin", "what follows from it, or choose another --out"
    content = file.read_bytes()
    assert count_complete(recipes, None, vocab_size=VOCAB) == len(recipes)
    try:
        file.write_bytes(content[2:] + content[:2])
        for stage in (0, 2):  # of what both read, each keeps its own fingerprint
            with pytest.raises(MinitronError) as caught:
                count_complete([recipes[stage]], None, vocab_size=VOCAB)
            out = recipes[stage].out
            assert str(caught.value) == (
                f"{out} is complete, and was made with another content of data.path={root}/tokens "
                f"than there is now; delete {out} and {remedy}"
            )
        file.rename(root / "away.bin")
        with pytest.raises(
            MinitronError, match=r"made of cannot be compared: .*tokens.bin does not"
        ):
            count_complete(recipes[:1], None, vocab_size=VOCAB)
        (root / "away.bin").rename(file)
    finally:
        file.write_bytes(content)
    with pytest.raises(MinitronError, match="made with another content of the tokenizer than"):
        count_complete(recipes[:1], SimpleNamespace(fingerprint="other"), vocab_size=VOCAB)
    inputs = recipes[2].out / artifact.INPUTS
    before = inputs.read_text()
    try:
        artifact.write_json(inputs, json.loads(before) | {"data.valid_path": "other"})
        with pytest.raises(MinitronError, match=r"another content of data\.valid_path="):
            count_complete(recipes[2:3], None, vocab_size=VOCAB)
    finally:
        inputs.write_text(before)
