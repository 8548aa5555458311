import json
import pickle
import shutil

import pytest

from minitron.data import tokenizer as tokenizer_module
from minitron.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from minitron.errors import MinitronError

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  a  \n\n\t b  ",
    "\r\n",
    "12345 漢字 é \U0001f600",
    "a\x00b\ufeff",
    "def f(x):\n    return  x\n",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_source_code_comes_back_exactly(tokenizer, documents):
    for document in documents:
        ids = tokenizer.encode(document)
        assert tokenizer.decode(ids) == document
        assert len(ids) < len(document) / 1.5
        assert tokenizer.eod not in ids  # nor any BOS: the text above would show it


def test_encode_equals_transformers(tokenizer, documents):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if isinstance(tokenizer, HuggingFaceTokenizer):
        reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    else:
        reference = AutoTokenizer.from_pretrained(tokenizer.path.parent)
    for text in (*documents, *HARD_TEXTS):
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == expected


def test_vocab_size_and_eod(sentencepiece_dir, hugging_face_dir):
    tokenizer = load_tokenizer(sentencepiece_dir)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod) == (600, 2)
    tokenizer = load_tokenizer(hugging_face_dir)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod) == (500, 1)


def test_added_tokens_count_up_to_the_largest_id(hugging_face_dir, tmp_path):
    content = json.loads((hugging_face_dir / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 700, "content": "<pad>"})
    content["model"]["vocab"]["<pad>"] = 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).vocab_size == 701


def test_directory_prefers_tokenizer_json(sentencepiece_dir, hugging_face_dir, tmp_path):
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    shutil.copy(hugging_face_dir / "tokenizer.json", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer)


@pytest.mark.parametrize(
    ("configs", "eod"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|begin_of_text|>"}}, 0),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 7}}, 7),
        ({"config.json": {"eos_token_id": [8, 9]}}, 8),
        ({"config.json": {}, "generation_config.json": {"eos_token_id": 9}}, 9),
        ({"config.json": {"eos_token_id": []}}, 1),  # the well-known <|end_of_text|>
        ({}, 1),
    ],
)
def test_eod_is_found_in_the_configs_in_turn(hugging_face_dir, tmp_path, configs, eod):
    shutil.copy(hugging_face_dir / "tokenizer.json", tmp_path)
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eod == eod


def test_fingerprint_follows_the_content(sentencepiece_dir, hugging_face_dir, tmp_path):
    original = load_tokenizer(hugging_face_dir)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    original.copy_to(copy)
    assert load_tokenizer(copy).fingerprint == original.fingerprint
    assert load_tokenizer(sentencepiece_dir).fingerprint != original.fingerprint
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"<|end_of_text|>"', '"<|end_of_txt|>"'))
    (copy / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_txt|>"}')
    assert load_tokenizer(copy).fingerprint != original.fingerprint


def test_files_are_copied_under_the_names_transformers_knows(sentencepiece_dir, tmp_path):
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path / "mine.model")
    shutil.copy(sentencepiece_dir / "tokenizer_config.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path / "mine.model")
    assert [f.name for f in tokenizer.files] == ["mine.model", "tokenizer_config.json"]
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.copy_to(out)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (sentencepiece_dir / name).read_bytes()


def test_pickled_tokenizer_works(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a pickled text") == tokenizer.encode("a pickled text")
    assert (copy.eod, copy.fingerprint) == (tokenizer.eod, tokenizer.fingerprint)


def test_training_is_deterministic(sentencepiece_dir, documents, tmp_path):
    train_sentencepiece(iter(documents), 600, tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (sentencepiece_dir / name).read_bytes()


def test_training_takes_an_even_sample_of_large_text(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MAX_TRAINING_PIECES", 4)
    digits = [str(i) * 3 + "\n" for i in range(10)]  # 4 pieces fill the buffer: every second stays
    assert tokenizer_module._sample(digits) == ["000\n", "444\n", "888\n"]


def test_training_uses_lines_beyond_sentencepiece_limit(tmp_path):
    train_sentencepiece(["qzx" * 20000], 275, tmp_path)  # one line, without a space
    assert len(load_tokenizer(tmp_path).encode("qzx" * 100)) < 50


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "no text to train"),
        (["", ""], 300, "no text to train"),
        (["hello world"], 1000, "tokenizer.train_vocab_size=1000 .* at most 285"),
        (["hello world"], 100, "tokenizer.train_vocab_size=100 .* at least 267"),
    ],
)
def test_training_errors_say_what_to_change(tmp_path, texts, vocab_size, message):
    with pytest.raises(MinitronError, match=message):
        train_sentencepiece(texts, vocab_size, tmp_path)
    assert not list(tmp_path.iterdir())


def test_loading_errors_say_what_to_change(hugging_face_dir, tmp_path):
    def refused(path, message):
        with pytest.raises(MinitronError, match=message) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path, "holds neither tokenizer.json nor tokenizer.model")
    refused(tmp_path / "missing", "missing does not exist; give a directory")
    (tmp_path / "vocab.txt").write_text("a")
    refused(tmp_path / "vocab.txt", "neither a .json nor a .model")
    (tmp_path / "empty.model").write_bytes(b"")
    refused(tmp_path / "empty.model", "not a sentencepiece model")
    (tmp_path / "tiktoken.model").write_bytes(b"IQ== 0\nIg== 1\n")
    refused(tmp_path / "tiktoken.model", "tiktoken")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, "not a Hugging Face tokenizer.json")

    shutil.copy(hugging_face_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    refused(tmp_path, 'eos_token "<stop>", which .*tokenizer.json does not hold')
    (tmp_path / "tokenizer_config.json").unlink()
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|end_of_text|>", "<unknown>"))
    refused(tmp_path, "which token ends a document; put a tokenizer_config.json")
