"""Layers left out of a loaded model, against transformers' model with those layers really gone."""

import copy
import dataclasses
import json
import re

import pytest
import torch
import torch.distributed as dist

from minitron import metrics
from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError
from minitron.model import schedule
from minitron.parallel import initialize
from minitron.prune import ablation
from minitron.prune.ablation import measure_depth
from minitron.prune.depth import Ablation, DepthScores, load_depth, ranked_layers, save_depth
from minitron.prune.importance import open_calibration
from minitron.sections.data import DataConfig
from minitron.sections.prune import AblationConfig, ImportanceConfig
from tests.runs import SEQ_LENGTH, VOCAB, run_on, write_tokens
from tests.tiny import save_llama

NUM_SAMPLES = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, save_llama(directory, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    return write_tokens(prefix, 7 * SEQ_LENGTH + 1)


def without(model, layers):
    """A copy of the model whose layers, counted from 1, were deleted."""
    smaller = copy.deepcopy(model)
    for layer in sorted(layers, reverse=True):
        del smaller.model.layers[layer - 1]
    for i, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = i
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    return smaller


def brute_force(model, prefix, layers):
    """Loss and logit distance by their definitions."""
    stream = torch.from_numpy(TokenStream(prefix).read(0, NUM_SAMPLES * SEQ_LENGTH + 1))
    inputs, labels = stream[:-1].view(-1, SEQ_LENGTH), stream[1:].view(-1, SEQ_LENGTH)
    with torch.no_grad():
        logits = without(model, layers)(inputs).logits.double()
        reference = model(inputs).logits.double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    distance = (logits - reference).square().sum() / reference.square().sum()
    return loss.item(), distance.item()


def _measure(parallel, directory, prefix, config, precision="fp32"):
    model, batches, _ = open_calibration(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=7, micro_batch_size=2),
        topology=initialize(parallel),
        precision=precision,
    )
    before = [layer.forward for layer in model.decoder.layers]
    depth = measure_depth(model, batches, config)
    assert [layer.forward for layer in model.decoder.layers] == before
    return depth


@pytest.mark.parametrize("topology", ["tp1", "tp2", "tp2+sp", "pp2 uneven", "dp2", "tp2+sp pp2"])
def test_trials_equal_models_without_the_layers(model, tokens, topology):
    directory, reference = model
    config = AblationConfig(layers=True, windows=[2, 3], samples=NUM_SAMPLES)
    ranks = run_on(topology, _measure, directory, tokens, config)
    depth = ranks[0]
    assert all(other == depth for other in ranks)
    assert depth.samples == NUM_SAMPLES
    assert depth.lm_loss == pytest.approx(brute_force(reference, tokens, [])[0], rel=1e-6)
    assert [trial.drop_layers for trial in depth.layers] == [[1], [2], [3], [4]]
    windows = [[1, 2], [2, 3], [3, 4], [1, 2, 3], [2, 3, 4]]
    assert [trial.drop_layers for trial in depth.windows] == windows
    for trial in (*depth.layers, *depth.windows):
        loss, distance = brute_force(reference, tokens, trial.drop_layers)
        assert trial.lm_loss == pytest.approx(loss, rel=1e-6)
        assert trial.logit_distance == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize("topology", ["tp1", "tp2+sp pp2"])
def test_trials_in_half_precision(model, tokens, topology):
    """A bf16 number has 8 bits: losses and distances are off by less than a hundredth."""
    directory, reference = model
    config = AblationConfig(layers=True, samples=NUM_SAMPLES)
    depth = run_on(topology, _measure, directory, tokens, config, "bf16")[0]
    for trial in depth.layers:
        loss, distance = brute_force(reference, tokens, trial.drop_layers)
        assert trial.lm_loss == pytest.approx(loss, rel=0.01)
        assert trial.logit_distance == pytest.approx(distance, rel=0.01)


@pytest.mark.parametrize("criterion", ["lm_loss", "logit_distance"])
def test_greedy_search_takes_the_cheapest_layer_each_time(model, tokens, criterion):
    directory, reference = model
    config = AblationConfig(greedy=3, samples=NUM_SAMPLES, criterion=criterion)
    (depth,) = run_on("tp1", _measure, directory, tokens, config)
    assert depth.criterion == criterion
    assert [trial.drop_layers for trial in depth.layers] == [[1], [2], [3], [4]]
    gone = []
    for step in depth.greedy:
        costs = {
            layer: brute_force(reference, tokens, [*gone, layer])[criterion == "logit_distance"]
            for layer in range(1, 5)
            if layer not in gone
        }
        gone.append(min(costs, key=costs.get))
        assert step.drop_layers == gone
        assert getattr(step, criterion) == pytest.approx(min(costs.values()), rel=1e-5)
    assert len(gone) == 3


def _measure_with_tasks(parallel, directory, prefix, config):
    """Accuracy stands for any measurement: it reads off the model which layers are bypassed."""
    model, batches, _ = open_calibration(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=7, micro_batch_size=2),
        topology=initialize(parallel),
        precision="fp32",
    )

    def accuracy():
        gone = torch.zeros(5)
        for layer in model.decoder.layers:
            gone[layer.layer_number] = "forward" in vars(layer)
        dist.all_reduce(gone)
        return ACCURACIES[tuple(gone.nonzero().flatten().tolist())]

    return measure_depth(model, batches, config, accuracy)


ACCURACIES = {
    (): 0.9,
    (1,): 0.3,
    (2,): 0.6,
    (3,): 0.7,
    (4,): 0.2,
    (1, 2): 0.3,
    (2, 3): 0.2,
    (3, 4): 0.5,
    (1, 3): 0.4,
    (2, 4): 0.1,
}


def test_accuracy_ranks_layers_windows_and_the_greedy_search(model, tokens, tmp_path):
    config = AblationConfig(
        layers=True, windows=[2], greedy=2, samples=NUM_SAMPLES, criterion="accuracy"
    )
    ranks = run_on("pp2", _measure_with_tasks, model[0], tokens, config)
    depth = ranks[0]
    assert ranks[1] == depth
    assert depth.accuracy == 0.9
    for trial in (*depth.layers, *depth.windows, *depth.greedy):
        assert trial.accuracy == ACCURACIES[tuple(sorted(trial.drop_layers))]
    assert [trial.drop_layers for trial in depth.greedy] == [[3], [3, 4]]
    save_depth(tmp_path, depth)
    assert load_depth(tmp_path) == depth
    assert ranked_layers(depth, "accuracy", 2) == (2, 3)
    assert ranked_layers(depth, "window_accuracy", 2) == (3, 4)
    (plain,) = run_on("tp1", _measure, model[0], tokens, AblationConfig(layers=True))
    with pytest.raises(MinitronError, match=r"layer_ranking=accuracy needs .*--tasks.names"):
        ranked_layers(plain, "accuracy", 2)


def test_equally_accurate_trials_are_ranked_by_their_loss_and_then_the_later_goes():
    trials = [
        Ablation(drop_layers=[i], lm_loss=x, logit_distance=0.0, accuracy=0.5)
        for i, x in enumerate((3.0, 2.0, 4.0, 2.0), start=1)
    ]
    windows = [dataclasses.replace(trials[i], drop_layers=[i + 1, i + 2]) for i in (0, 2)]
    depth = DepthScores(
        samples=1, lm_loss=1.0, accuracy=0.6, layers=trials, windows=windows, greedy=[]
    )
    assert ranked_layers(depth, "accuracy", 1) == (4,)
    assert ranked_layers(depth, "accuracy", 3) == (1, 2, 4)
    assert ranked_layers(depth, "window_logit_distance", 2) == (3, 4)
    assert ranked_layers(depth, "window_accuracy", 2) == (1, 2)


def _count_passes(parallel, directory, prefix, config):
    """How many passes were announced, and how many samples went through the model."""
    announced, done = [], []

    def progress(*args, total=None, **options):
        announced.append(total)
        return metrics.progress(*args, total=total, **options)

    def run_schedule(model, group, *args, **options):
        done.append(len(group))
        return schedule.run_schedule(model, group, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "progress", progress)
        patch.setattr(ablation, "run_schedule", run_schedule)
        _measure(parallel, directory, prefix, config)
    return announced, sum(done)


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        ({"layers": True}, 1 + 4),
        ({"windows": [3, 2, 2]}, 1 + 2 + 3),
        ({"greedy": 1}, 1 + 4),  # the first layer is one of the trials of each
        ({"layers": True, "windows": [2], "greedy": 3}, 1 + 4 + 3 + (1 + 3) + (1 + 2)),
    ],
)
def test_no_pass_is_made_twice_and_all_are_announced(model, tokens, keys, passes):
    ((announced, done),) = run_on("tp1", _count_passes, model[0], tokens, AblationConfig(**keys))
    assert announced == [passes * 4]  # micro-batches of two of seven samples
    assert done == passes * 4


def test_layers_to_drop_by_trial(model, tokens, tmp_path):
    config = AblationConfig(layers=True, windows=[2], greedy=2, samples=NUM_SAMPLES)
    (depth,) = run_on("tp1", _measure, model[0], tokens, config)
    save_depth(tmp_path, depth)
    assert load_depth(tmp_path) == load_depth(tmp_path / "scores.safetensors") == depth
    assert depth.criterion == "lm_loss"
    for name in ("lm_loss", "logit_distance"):
        order = sorted(depth.layers, key=lambda trial: getattr(trial, name))
        expected = sorted(trial.drop_layers[0] for trial in order[:2])
        assert list(ranked_layers(depth, name, 2)) == expected
    for name, measure in (("window", "lm_loss"), ("window_logit_distance", "logit_distance")):
        costs = {tuple(trial.drop_layers): getattr(trial, measure) for trial in depth.windows}
        assert ranked_layers(depth, name, 2) == min(costs, key=costs.get)
    assert list(ranked_layers(depth, "greedy", 2)) == sorted(depth.greedy[1].drop_layers)
    missing = {"window": "windows 3", "window_logit_distance": "windows 3", "greedy": "greedy 3"}
    for ranking, option in missing.items():
        with pytest.raises(MinitronError, match=f"layer_ranking={ranking} .*--depth.{option}$"):
            ranked_layers(depth, ranking, 3)


def test_an_old_file_does_not_say_what_its_greedy_search_minded(tmp_path):
    taken = Ablation(drop_layers=[2], lm_loss=2.0, logit_distance=0.1)
    depth = DepthScores(samples=1, lm_loss=1.0, layers=[], windows=[], greedy=[taken])
    save_depth(tmp_path, dataclasses.replace(depth, criterion="accuracy"))
    assert load_depth(tmp_path).greedy_name == "greedy by accuracy"
    values = json.loads((tmp_path / "depth.json").read_text())
    assert values.pop("criterion") == "accuracy"
    (tmp_path / "depth.json").write_text(json.dumps(values))
    assert load_depth(tmp_path) == depth
    assert depth.greedy_name == "greedy"


def test_depth_file_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(MinitronError, match=r"depth.json does not exist; run launch/importance.py"):
        load_depth(tmp_path)
    (tmp_path / "depth.json").write_text('{"layers": []}')
    with pytest.raises(MinitronError, match=r"is not what launch/importance.py writes"):
        load_depth(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"samples": 0}, "depth.samples=0 must be at least 1"),
        ({"greedy": -1}, "depth.greedy=-1 must be at least 0"),
        (
            {"layers": True, "criterion": "accuracy"},
            "depth.criterion=accuracy is of the greedy search, but depth.greedy=0; add "
            "--depth.greedy, or leave it out: other trials serve every ranking",
        ),
        ({"greedy": 4}, "depth.greedy=4 leaves none of the model's 4 layers; choose at most 3"),
        ({"windows": [2, 4]}, "depth.windows=4, but the model has 4 layers; choose 1 to 3"),
    ],
)
def test_trials_that_are_impossible(keys, message):
    with pytest.raises(MinitronError, match=re.escape(message)):
        AblationConfig(**keys).check(4)
