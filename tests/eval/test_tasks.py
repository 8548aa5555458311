"""Tasks of the lm-evaluation-harness against its own Hugging Face backend."""

import importlib.util
import inspect
import json
import re
import textwrap

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer

from minitron.data.tokenizer import find_tokenizer, train_sentencepiece
from minitron.errors import MinitronError
from minitron.eval.tasks import TaskConfig, evaluate_tasks, task_table
from minitron.model.llama import freeze
from minitron.parallel import initialize
from tests.runs import build_model, run_on
from tests.tiny import save_llama

pytest.importorskip("lm_eval")
VOCAB = 400
CONTEXT = 48


def save_llama3_tokenizer(directory):
    """A byte-level BPE whose template puts BOS before every text, as Llama 3's does."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([inspect.getsource(textwrap)], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_tasks(directory):
    """A multiple-choice task, one whose contexts are empty, and the perplexity of long texts."""
    questions = [
        {"question": f"def f{i}(x):", "choices": ["return x", "raise x", " pass # " * (i % 4)]}
        for i in range(9)
    ]
    for i, question in enumerate(questions):
        question |= {"choices": [c or "yield" for c in question["choices"]], "gold": i % 3}
    texts = [{"text": part} for part in inspect.getsource(textwrap.wrap).split("\n\n")]
    for name, rows in {"questions": questions, "texts": texts}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: "
    choice = "\noutput_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n"
    choice += "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    files = {
        "code": f"{common}{directory}/questions.jsonl{choice}doc_to_text: question\n",
        "blank": f"{common}{directory}/questions.jsonl{choice}doc_to_text: ''\n",
        "texts": f"{common}{directory}/texts.jsonl\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: text\nmetric_list:\n  - metric: byte_perplexity\n",
        "written": f"{common}{directory}/texts.jsonl\noutput_type: generate_until\n"
        "doc_to_text: text\ndoc_to_target: text\nmetric_list:\n  - metric: exact_match\n"
        "generation_kwargs:\n  until: ['x']\n",
        "lost": f"{common}{directory}/lost.jsonl{choice}doc_to_text: ''\n",
    }
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(f"task: minitron_{name}\n{content}")


@pytest.fixture(scope="module", params=["bos", "no bos"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    options = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    reference = save_llama(directory, **options)
    if request.param == "bos":
        save_llama3_tokenizer(directory)
    else:
        train_sentencepiece([inspect.getsource(textwrap)], VOCAB, directory)
    return directory, reference


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    write_tasks(directory)
    return directory


def by_the_harness(model, tasks, names, **options):
    """What lm-eval finds with transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    directory, reference = model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lm = HFLM(pretrained=reference, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(lm, tasks=names, task_manager=manager, **options)


def _evaluate(parallel, directory, config):
    topology = initialize(parallel)
    model = freeze(build_model(directory, topology))
    return evaluate_tasks(model, find_tokenizer(directory), config, micro_batch_size=4)


def _failure(parallel, directory, config):
    with pytest.raises(MinitronError) as caught:
        _evaluate(parallel, directory, config)
    return str(caught.value)


@pytest.mark.parametrize("topology", ["tp1", "tp2", "pp2 dp2"])
def test_results_are_those_of_the_harness_with_transformers(model, tasks, topology):
    names = ["minitron_code", "minitron_blank", "minitron_texts"]
    config = TaskConfig(names=names, include_path=tasks)
    ranks = run_on(topology, _evaluate, model[0], config)
    assert all(found == ranks[0] for found in ranks)
    expected = by_the_harness(model, tasks, names)["results"]
    for name in names:
        for metric, value in ranks[0][name].items():
            assert value == pytest.approx(expected[name][f"{metric},none"], rel=1e-4), (
                name,
                metric,
            )
    assert ranks[0]["minitron_code"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert f"{ranks[0]['minitron_texts']['byte_perplexity']:.4f}" in task_table(ranks[0])


def _log_likelihoods(parallel, directory, texts, pairs):
    from lm_eval.api.instance import Instance

    from minitron.eval.harness import HarnessModel
    from minitron.eval.loglikelihood import score_continuations

    model = freeze(build_model(directory, initialize(parallel)))
    lm = HarnessModel(
        find_tokenizer(directory),
        lambda requests: score_continuations(model, requests, micro_batch_size=3),
        CONTEXT,
    )
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood_rolling(rolling), lm.loglikelihood(asked)


def test_log_likelihoods_are_those_of_transformers(model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    directory, reference = model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    long = inspect.getsource(textwrap.dedent)
    # A text that spells BOS out has it already; sentencepiece takes the letters as they are.
    bos = tokenizer.bos_token if (directory / "tokenizer.json").exists() else ""
    texts = ["x", "import re", long[:200], f"{bos}import re"]
    pairs = [("", "import re"), ("import", " re"), ("import ", "re"), (long[:600], " return")]
    pairs += [("a", "  b"), (f"{bos}def", " wrap"), ("x\n\n", "y")]
    # Its cache of logits goes wrong where two requests are the same.
    options = {"batch_size": 1, "max_length": CONTEXT, "logits_cache": False}
    lm = HFLM(pretrained=reference, tokenizer=tokenizer, **options)
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ((ours_rolling, ours),) = run_on("tp1", _log_likelihoods, directory, texts, pairs)
    assert ours_rolling == pytest.approx(lm.loglikelihood_rolling(rolling), rel=1e-5)
    for (score, greedy), expected in zip(ours, lm.loglikelihood(asked), strict=True):
        assert score == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minitron_kode", "the harness knows no task minitron_kode; did you mean minitron_code.$"),
        ("minitron_written", "a task generates text, which is not evaluated here; choose tasks"),
        ("minitron_lost", "the data of tasks.names=.* cannot be had .*lost.jsonl"),
    ],
)
def test_tasks_that_cannot_be_measured(tmp_path, tasks, name, message):
    """Both ranks hear of it, and neither waits for the other."""
    save_llama(tmp_path, vocab_size=VOCAB)
    train_sentencepiece([inspect.getsource(textwrap)], VOCAB, tmp_path)
    config = TaskConfig(names=[name], include_path=tasks)
    first, second = run_on("dp2", _failure, tmp_path, config)
    assert first == second
    assert re.match(message, first)


def test_a_model_without_a_tokenizer(tmp_path, tasks):
    save_llama(tmp_path)
    config = TaskConfig(names=["minitron_code"], include_path=tasks)
    (message,) = run_on("tp1", _failure, tmp_path, config)
    assert message.startswith("tasks are text, but the model's directory has no tokenizer; put its")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"limit": 0}, "tasks.limit=0 must be at least 1"),
        ({"num_fewshot": -1}, "tasks.num_fewshot=-1 must be at least 0"),
        ({"names": ["a"], "include_path": "no"}, "tasks.include_path=no is not a directory"),
    ],
)
def test_mistakes(keys, message, tmp_path):
    if "include_path" in keys:
        keys = keys | {"include_path": tmp_path / "no"}
        message = "is not a directory; give one of task files"
    with pytest.raises(MinitronError, match=message):
        TaskConfig(**keys)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MinitronError, match=r"needs the lm-evaluation-harness; pip install 'mini"):
        TaskConfig(names=["winogrande"])


def test_limit_and_examples_reach_the_harness(model, tasks):
    config = TaskConfig(names=["minitron_code"], include_path=tasks, num_fewshot=1, limit=4)
    (found,) = run_on("tp1", _evaluate, model[0], config)
    options = {"num_fewshot": 1, "limit": 4}
    expected = by_the_harness(model, tasks, ["minitron_code"], **options)["results"]
    assert found["minitron_code"]["acc"] == expected["minitron_code"]["acc,none"]
    assert torch.tensor(found["minitron_code"]["acc"]).mul(4).frac() == 0
