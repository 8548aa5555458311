"""Tasks of the lm-evaluation-harness against its own Hugging Face backend."""

import functools
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
from minitron.eval.tasks import Tasks, task_table
from minitron.model.llama import freeze
from minitron.parallel import initialize
from minitron.sections.eval import TaskConfig
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
    written = "\noutput_type: generate_until\ndoc_to_text: text\ndoc_to_target: text\n"
    written += "metric_list:\n  - metric: exact_match\ngeneration_kwargs:\n  until: ['x']\n"
    files = {
        "code": f"{common}{directory}/questions.jsonl{choice}doc_to_text: question\n",
        "blank": f"{common}{directory}/questions.jsonl{choice}doc_to_text: ''\n",
        "texts": f"{common}{directory}/texts.jsonl\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: text\nmetric_list:\n  - metric: byte_perplexity\n",
        "written": f"{common}{directory}/written.jsonl{written}  max_gen_toks: 9\n",
        "drawn": f"{common}{directory}/texts.jsonl{written}  do_sample: true\n  temperature: 0.5\n",
        "long": f"{common}{directory}/texts.jsonl{written}  max_gen_toks: {CONTEXT}\n",
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
        # Never the likeliest are single bytes: sentencepiece and transformers spell those that are
        # no UTF-8 differently.
        reference.lm_head.weight.data[3 : 3 + 256] = 0
        reference.save_pretrained(directory)
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
    tasks = Tasks(config, find_tokenizer(directory), parallel)
    model = freeze(build_model(directory, topology))
    found = tasks.evaluate(model, micro_batch_size=4)
    assert tasks.evaluate(model, micro_batch_size=3) == found
    return found


def _failure(parallel, directory, config):
    with pytest.raises(MinitronError) as caught:
        _evaluate(parallel, directory, config)
    return str(caught.value)


def _failure_before_a_model(parallel, directory, config):
    initialize(parallel)
    with pytest.raises(MinitronError) as caught:
        Tasks(config, find_tokenizer(directory), parallel)
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
    score = functools.partial(score_continuations, model, micro_batch_size=3)
    lm = HarnessModel(find_tokenizer(directory), score, list, CONTEXT)
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


def _answers(parallel, directory, requests):
    from lm_eval.api.instance import Instance

    from minitron.eval.answers import answer_questions
    from minitron.eval.harness import HarnessModel

    model = freeze(build_model(directory, initialize(parallel)))
    tokenizer = find_tokenizer(directory)
    answer = functools.partial(answer_questions, model, tokenizer, micro_batch_size=2)
    lm = HarnessModel(tokenizer, list, answer, CONTEXT)
    return lm.generate_until([Instance("generate_until", {}, r, 0) for r in requests])


@pytest.fixture(scope="module")
def asked(model):
    """Texts to continue, with lm-eval's answers by transformers; most are cut at some text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    directory, reference = model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference.generation_config.eos_token_id = tokenizer.eos_token_id
    lm = HFLM(pretrained=reference, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)

    def answers(requests):
        return lm.generate_until([Instance("generate_until", {}, r, 0) for r in requests])

    source = inspect.getsource(textwrap)
    texts = ["x", "return lines", "import re", "def wrap(text):\n", source[:300], source[40:75]]
    freely = [(text, {"until": [], "max_gen_toks": 12}) for text in texts]
    middles = [answer[len(answer) // 2 :][:2] for answer in answers(freely)]
    cut = [
        (text, {"until": [middle, "never"], "max_gen_toks": 12, "do_sample": False})
        for text, middle in zip(texts, middles, strict=True)
    ]
    short = [(text, {"until": "\n\n", "max_new_tokens": 3, "temperature": 0.0}) for text in texts]
    requests = [*freely, *cut, *short]
    found = answers(requests)
    assert sum(a.startswith(b) and a != b for a, b in zip(found, found[6:12], strict=False)) >= 4
    return requests, found


@pytest.mark.parametrize("topology", ["tp1", "tp2", "pp2 dp2"])
def test_answers_are_those_of_transformers(model, asked, topology):
    requests, expected = asked
    assert run_on(topology, _answers, model[0], requests)[0] == expected


def test_a_task_that_generates_text(model, asked, tasks, tmp_path):
    """Half of the answers that are wanted are those that the model gives."""
    requests = [(text, {"until": ["x"], "max_gen_toks": 9}) for (text, _) in asked[0][1:6]]
    ((*answers,),) = run_on("tp1", _answers, model[0], requests)
    rows = [{"text": text, "gold": a} for (text, _), a in zip(requests, answers, strict=True)]
    rows[0]["gold"] += "?"
    (tmp_path / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = (tasks / "written.yaml").read_text().replace(str(tasks), str(tmp_path))
    task = task.replace("doc_to_target: text", "doc_to_target: gold")
    (tmp_path / "written.yaml").write_text(task)
    config = TaskConfig(names=["minitron_written"], include_path=tmp_path)
    first, second = run_on("pp2", _evaluate, model[0], config)
    assert first == second
    expected = by_the_harness(model, tmp_path, ["minitron_written"])["results"]
    found = first["minitron_written"]["exact_match"]
    assert found == expected["minitron_written"]["exact_match,none"] == 0.8
    (message, _) = run_on("tp2+sp", _failure_before_a_model, model[0], config)
    assert message == (
        "tasks.names=['minitron_written'] generate text, token by token, which leaves no sequence "
        "to share; leave parallel.sequence_parallel out"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minitron_kode", "the harness knows no task minitron_kode; did you mean minitron_code.$"),
        (
            "minitron_drawn",
            "a task generates with {'until': \\['x'\\], 'do_sample': True, .*; here a task's "
            "generation_kwargs may hold until, max_gen_toks and do_sample: false: leave the task "
            "out, or copy it without the rest$",
        ),
        (
            "minitron_long",
            f"a task's answers may have {CONTEXT} tokens, which leaves its questions no place "
            rf"among the {CONTEXT} that the model takes \(max_position_embeddings\); lower",
        ),
        ("minitron_lost", "the data of the task minitron_lost cannot be had .*lost.jsonl"),
    ],
)
def test_tasks_that_cannot_be_measured(tmp_path, tasks, name, message):
    """Both ranks hear of it, and neither waits for the other."""
    save_llama(tmp_path, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    train_sentencepiece([inspect.getsource(textwrap)], VOCAB, tmp_path)
    config = TaskConfig(names=[name], include_path=tasks)
    first, second = run_on("dp2", _failure, tmp_path, config)
    assert first == second
    assert re.match(message, first)


def test_a_model_without_a_tokenizer(tmp_path, tasks):
    save_llama(tmp_path)
    config = TaskConfig(names=["minitron_code"], include_path=tasks)
    (message,) = run_on("tp1", _failure_before_a_model, tmp_path, config)
    assert message == (
        "tasks.names=['minitron_code'] are text, but the model's directory has no tokenizer; put "
        "its tokenizer.json or tokenizer.model there"
    )


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
