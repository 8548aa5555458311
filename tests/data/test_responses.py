"""Prompts read from text, and responses kept as text and as tokens."""

import json

import numpy as np
import pytest

from minitron.data.indexed import TokenStream
from minitron.data.responses import append_responses, count_answered, read_prompts, write_responses
from minitron.errors import MinitronError
from minitron.sections.data import PromptConfig

CONTEXT = 50


@pytest.fixture
def text_dir(tmp_path, documents):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(line) for line in ({"prompt": "def f(x):"}, {"prompt": "import os"}))
    )
    (tmp_path / "b.txt").write_text(documents[0])
    (tmp_path / "c.txt").write_text("brief")
    return tmp_path


def test_prompts_are_whole_and_texts_are_cut(text_dir, tokenizer, documents):
    config = PromptConfig(path=[str(text_dir)], tokens=20)
    found = read_prompts(config, tokenizer, context=CONTEXT)
    expected = [tokenizer.encode("def f(x):"), tokenizer.encode("import os")]
    assert found == [*expected, tokenizer.encode(documents[0])[:20]]
    limited = PromptConfig(path=[str(text_dir)], limit=1)
    assert read_prompts(limited, tokenizer, context=CONTEXT) == expected[:1]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"prompt": ""}', {}, "x.jsonl:1: the prompt has 0 tokens; the model takes prompts of 1"),
        (json.dumps({"prompt": "word " * 60}), {}, "tokens; the model takes prompts of 1 to 49: "),
        ('{"text": "some"}', {}, "say with --prompts.tokens how many tokens of each are"),
        ('{"text": "some"}', {"tokens": 50}, "prompts.tokens=50 leaves no room in the model's"),
        ('{"text": "some"}', {"tokens": 49}, "x.jsonl holds no prompt; give a .jsonl file with"),
        (
            '{"id": 3}',
            {},
            "x.jsonl:1: there is no text in the fields `prompt`, or `text` (keys",
        ),
        ("[3]", {}, "x.jsonl:1: there is no text in the fields `prompt`, or `text` (no object)"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path, tokenizer, content, options, message):
    (tmp_path / "x.jsonl").write_text(content)
    config = PromptConfig(path=[str(tmp_path / "x.jsonl")], **options)
    with pytest.raises(MinitronError) as caught:
        read_prompts(config, tokenizer, context=CONTEXT)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": []}, "prompts.path is empty; give at least one file or directory"),
        ({"path": ["x"], "tokens": 0}, "prompts.tokens=0 must be at least 1"),
        ({"path": ["x"], "limit": 0}, "prompts.limit=0 must be at least 1"),
    ],
)
def test_settings_without_sense_are_refused(options, message):
    with pytest.raises(MinitronError) as caught:
        PromptConfig(**options)
    assert str(caught.value) == message


def test_responses_become_documents_with_masked_prompts(tmp_path, tokenizer):
    path = tmp_path / "responses.jsonl"
    first, second = tokenizer.encode("def f(x):"), tokenizer.encode("import os")
    answers = tokenizer.encode(" return x"), tokenizer.encode(", sys")
    assert count_answered(path, []) == 0
    append_responses(path, [(first, answers[0], True)], tokenizer)
    append_responses(path, [(second, answers[1], False), (first, [], True)], tokenizer)
    assert count_answered(path, [first, second, first, second]) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1]["prompt"] == tokenizer.decode(second)
    assert lines[1]["response"] == tokenizer.decode(answers[1])
    assert [line["finished"] for line in lines] == [True, False, True]

    parts = [first, [*answers[0], tokenizer.eod], second, answers[1], first, [tokenizer.eod]]
    assert write_responses(tmp_path, tokenizer) == {"documents": 3, "tokens": sum(map(len, parts))}
    stream = TokenStream(tmp_path / "responses")
    assert stream.read(0, stream.num_tokens).tolist() == [t for part in parts for t in part]
    expected = np.repeat([True, False] * 3, [len(part) for part in parts])
    assert stream.is_prompt(0, stream.num_tokens).tolist() == expected.tolist()


def test_what_a_killed_run_left_of_a_line_is_cut_off(tmp_path, tokenizer):
    path = tmp_path / "responses.jsonl"
    append_responses(path, [([1, 2], [3], True)] * 2, tokenizer)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt": "ha')
    assert count_answered(path, [[1, 2]] * 3) == 2
    assert path.read_bytes() == whole


def test_a_damaged_line_is_refused(tmp_path, tokenizer):
    path = tmp_path / "responses.jsonl"
    append_responses(path, [([1, 2], [3], True)], tokenizer)
    path.write_bytes(path.read_bytes() + b'{"prompt": "half"}\n')
    message = r"responses.jsonl:2 is damaged \('prompt_tokens'\); delete that line and those after"
    with pytest.raises(MinitronError, match=message):
        count_answered(path, [[1, 2]] * 3)


@pytest.mark.parametrize("prompts", [[[1, 2]], [[1, 2], [3]]])
def test_answers_to_other_prompts_are_not_continued(tmp_path, tokenizer, prompts):
    path = tmp_path / "responses.jsonl"
    append_responses(path, [([1, 2], [3], True)] * 2, tokenizer)
    with pytest.raises(MinitronError, match=r"responses.jsonl:2 answers another prompt than"):
        count_answered(path, prompts)
