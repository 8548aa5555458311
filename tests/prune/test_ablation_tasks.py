"""Accuracy without layers, against lm-eval on transformers' model with those layers really gone."""

import inspect
import json
import random
import textwrap

import pytest

from minitron.data.tokenizer import find_tokenizer, train_sentencepiece
from minitron.eval.tasks import Tasks, mean_metric
from minitron.parallel import initialize
from minitron.prune.ablation import measure_depth
from minitron.prune.importance import open_calibration
from minitron.sections.data import DataConfig
from minitron.sections.eval import TaskConfig
from minitron.sections.prune import AblationConfig, ImportanceConfig
from tests.eval.test_tasks import CONTEXT, VOCAB, by_the_harness
from tests.prune.test_ablation import without
from tests.runs import SEQ_LENGTH, run_on, write_tokens
from tests.tiny import save_llama

pytest.importorskip("lm_eval")
TASK = """task: guesses
dataset_path: json
test_split: test
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def write_task(directory):
    """Thirty questions without an answer: another model guesses others of them right."""
    draw = random.Random(0)
    words = inspect.getsource(textwrap).split()
    rows = [
        {"question": draw.choice(words), "choices": draw.sample(words, 3), "gold": i % 3}
        for i in range(30)
    ]
    file = directory / "guesses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "guesses.yaml").write_text(TASK.format(file=file))


def _measure(parallel, directory, prefix):
    topology = initialize(parallel)
    config = TaskConfig(names=["guesses"], include_path=directory)
    tasks = Tasks(config, find_tokenizer(directory), parallel)
    model, batches, _ = open_calibration(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=2),
        topology=topology,
        precision="fp32",
    )

    def accuracy():
        return mean_metric(tasks.evaluate(model, micro_batch_size=30), "acc")

    return measure_depth(model, batches, AblationConfig(greedy=2, criterion="accuracy"), accuracy)


def test_accuracies_are_those_of_models_without_the_layers(tmp_path):
    options = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    reference = save_llama(tmp_path, **options)
    train_sentencepiece([inspect.getsource(textwrap)], VOCAB, tmp_path)
    write_task(tmp_path)
    tokens = write_tokens(tmp_path / "tokens", 2 * SEQ_LENGTH + 1)
    depth, other = run_on("pp2", _measure, tmp_path, tokens)
    assert other == depth

    def by_force(layers):
        model = tmp_path, without(reference, layers)
        return by_the_harness(model, tmp_path, ["guesses"])["results"]["guesses"]["acc,none"]

    assert depth.accuracy == pytest.approx(by_force([]))
    assert [trial.drop_layers for trial in depth.layers] == [[1], [2], [3], [4]]
    for trial in (*depth.layers, depth.greedy[1]):
        assert trial.accuracy == pytest.approx(by_force(trial.drop_layers)), trial
    assert len({trial.accuracy for trial in depth.layers}) > 2
    assert depth.greedy[0].accuracy == max(trial.accuracy for trial in depth.layers)
