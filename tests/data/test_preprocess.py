import json
import os
import pickle
import resource

import numpy as np
import pytest

from minitron.data import preprocess as preprocess_module
from minitron.data.batches import collate
from minitron.data.indexed import TokenStream
from minitron.data.preprocess import check_tokenizer, preprocess, tokenised_prefix
from minitron.data.sampling import TokenWindows
from minitron.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from minitron.errors import MinitronError


@pytest.fixture
def tokenizer(sentencepiece_dir):
    return load_tokenizer(sentencepiece_dir)


@pytest.fixture
def corpus(tmp_path, documents):
    """A directory with every form of text; also the documents in their order."""
    root = tmp_path / "corpus"
    (root / "b").mkdir(parents=True)
    (root / "c.txt").write_bytes(b"windows\r\nlines\n")
    (root / "a.txt").write_bytes(documents[0].encode())
    (root / "empty.txt").write_bytes(b"")
    (root / "notes.md").write_text("not data")
    lines = [json.dumps({"id": 1, "text": documents[1]}), "", '{"text": "\\u00e9 \U0001f600"}']
    lines.append('{"text": ""}')
    (root / "b" / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root, [documents[0], documents[1], "é \U0001f600", "windows\r\nlines\n"]


def read_documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_too_little_text_is_named_with_its_source(tokenizer, corpus, tmp_path):
    root, _ = corpus
    preprocess([root / "c.txt", root / "b" / "x.jsonl"], tokenizer, tmp_path / "cached")
    windows = TokenWindows(TokenStream(tmp_path / "cached"), 100_000)
    message = rf"cached.bin \(of {root}/c.txt and 1 more\) has \d+ tokens, but a sample of "
    with pytest.raises(MinitronError, match=message):
        windows.check_not_empty()


def test_prompts_are_read_but_not_learnt(tokenizer, tmp_path):
    lines = [
        {"prompt": "What is a window?", "response": "An opening.", "id": 3},
        {"text": "def plain(): pass"},
        {"prompt": "", "response": "Nothing was asked."},
        {"prompt": "Silence", "response": ""},
        {"prompt": "", "response": ""},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = preprocess([tmp_path / "asked.jsonl"], tokenizer, tmp_path / "asked")
    assert (record["documents"], record["prompts"]) == (4, 3)

    tokens, learnt = [], []
    for line in lines[:-1]:
        prompt = tokenizer.encode(line.get("prompt", ""))
        text = line["text"] if "text" in line else line["response"]
        answer = [*tokenizer.encode(text), tokenizer.eod]
        tokens += prompt + answer
        learnt += [False] * len(prompt) + [True] * len(answer)
    stream = TokenStream(tmp_path / "asked")
    assert stream.read(0, stream.num_tokens).tolist() == tokens
    for start in range(len(tokens)):
        for stop in range(start + 1, len(tokens) + 1):
            expected = [not counts for counts in learnt[start:stop]]
            assert stream.is_prompt(start, stop).tolist() == expected

    windows = TokenWindows(stream, 5)
    batch = collate([windows[i] for i in range(len(windows))], size=len(windows), seq_length=5)
    assert batch.loss_mask.flatten().tolist() == learnt[1 : 1 + 5 * len(windows)]


def test_sequences_are_prompts_only_where_the_record_says_so(tokenizer, tmp_path):
    text = json.dumps({"prompt": "What is a window?", "response": "An opening."})
    (tmp_path / "asked.jsonl").write_text(text)
    preprocess([tmp_path / "asked.jsonl"], tokenizer, tmp_path / "asked")
    (tmp_path / "asked.json").unlink()
    stream = TokenStream(tmp_path / "asked")
    assert not stream.is_prompt(0, stream.num_tokens).any()


def test_documents_are_encoded_in_order_and_end_with_eod(corpus, tokenizer, tmp_path):
    root, expected = corpus
    record = preprocess([root], tokenizer, tmp_path / "out" / "train", workers=1)
    docs = read_documents(tmp_path / "out" / "train")
    assert docs == [[*tokenizer.encode(text), tokenizer.eod] for text in expected]
    assert [tokenizer.decode(doc[:-1]) for doc in docs] == expected
    assert (record["documents"], record["tokens"]) == (4, sum(map(len, docs)))
    stream = TokenStream(tmp_path / "out" / "train")
    assert stream.dtype == np.uint16
    stream.check_ids(tokenizer.vocab_size)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "train.bin",
        "train.idx",
        "train.json",
    ]
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == record
    assert [os.path.basename(s["path"]) for s in record["sources"]] == [
        "a.txt",
        "x.jsonl",
        "c.txt",
        "empty.txt",
    ]


def test_large_vocabulary_takes_int32(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65500)
    preprocess([corpus[0]], tokenizer, tmp_path / "big", workers=1)
    assert TokenStream(tmp_path / "big").dtype == np.int32


def test_workers_give_the_same_files(corpus, hugging_face_dir, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(hugging_face_dir)
    (corpus[0] / "z.jsonl").write_text('{"text": "one of many"}\n' * 500)
    preprocess([corpus[0]], tokenizer, tmp_path / "one", workers=1)
    monkeypatch.setattr(preprocess_module, "_MIN_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(preprocess_module, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    preprocess([corpus[0]], tokenizer, tmp_path / "two", workers=2)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()

    # A mistake in the text reaches the user from a worker as it does from here.
    (corpus[0] / "y.jsonl").write_text('{"text": "good"}\n' * 200 + "{bad\n")
    with pytest.raises(MinitronError, match=r"y\.jsonl:201: not valid JSON"):
        preprocess([corpus[0]], tokenizer, tmp_path / "three", workers=2)


class DyingTokenizer(SentencePieceTokenizer):
    """Dies as the kernel's out-of-memory killer would have it."""

    def __reduce__(self):
        return DyingTokenizer, (self.path,)

    def encode(self, text):
        os._exit(9)


def test_killed_worker_is_reported(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_module, "_MIN_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    broken = DyingTokenizer(tokenizer.path)
    assert isinstance(pickle.loads(pickle.dumps(broken)), DyingTokenizer)
    with pytest.raises(MinitronError, match=r"one of 2 tokenising processes .* data\.workers"):
        preprocess([corpus[0]], broken, tmp_path / "out" / "train", workers=2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', r"a\.jsonl:2: not valid JSON \(.*column 10\)"),
        ("a.jsonl", b'{"txt": "ok", "id": 3}\n', r"a\.jsonl:1: .*`text`, .* \(keys txt, id\)"),
        ("a.jsonl", b'\n\n{"text": 3}\n', r"a\.jsonl:3: there is no text"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: .* \(no object\)"),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', r"a\.jsonl:1: .*surrogate pair at character 2"),
        ("a.jsonl", b'{"text": "ab\xff"}\n', r"a\.jsonl:1: byte 12 is not UTF-8"),
        ("a.txt", b"abc\xe9", r"a\.txt: byte 3 is not UTF-8"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.jsonl", b'\n{"text": ""}\n', r"a\.jsonl holds no text"),
        ("a.csv", b"text", r"a\.csv is neither \.txt nor \.jsonl; give a \.txt file"),
    ],
)
def test_bad_text_is_named(tokenizer, tmp_path, name, content, message):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(MinitronError, match=message) as caught:
        preprocess([path], tokenizer, tmp_path / "out" / "train", workers=1)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def test_missing_or_empty_source_is_refused(tokenizer, tmp_path):
    with pytest.raises(MinitronError, match=r"nowhere does not exist; give a \.txt file"):
        preprocess([tmp_path / "nowhere"], tokenizer, tmp_path / "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MinitronError, match=r"empty holds no \.txt or \.jsonl file"):
        preprocess([tmp_path / "empty"], tokenizer, tmp_path / "train")


def test_existing_files_are_kept_unless_overwritten(corpus, tokenizer, tmp_path):
    preprocess([corpus[0] / "c.txt"], tokenizer, tmp_path / "train", workers=1)
    before = (tmp_path / "train.bin").read_bytes()
    with pytest.raises(MinitronError, match=r"train\.bin exists; .* --overwrite"):
        preprocess([corpus[0]], tokenizer, tmp_path / "train", workers=1)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(MinitronError, match="UTF-8"):
        preprocess([tmp_path / "bad.txt"], tokenizer, tmp_path / "train", overwrite=True)
    assert (tmp_path / "train.bin").read_bytes() == before
    preprocess([corpus[0]], tokenizer, tmp_path / "train", workers=1, overwrite=True)
    assert TokenStream(tmp_path / "train").num_documents == 4
    with pytest.raises(MinitronError, match=r"corpus is a directory; .*corpus/train"):
        preprocess([corpus[0]], tokenizer, corpus[0], overwrite=True)


def test_unwritable_place_is_reported(corpus, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MinitronError, match=r"tokenising into .*file/train.bin failed"):
        preprocess([corpus[0]], tokenizer, tmp_path / "file" / "train")


def test_full_disk_is_reported_and_leaves_nothing(corpus, tokenizer, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for a disk that is full
    try:
        with pytest.raises(MinitronError, match=r"out/train\.bin failed \(.*File too large"):
            preprocess([corpus[0]], tokenizer, tmp_path / "out" / "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").iterdir())


def test_other_tokenizer_is_refused(corpus, tokenizer, hugging_face_dir, tmp_path):
    prefix = tmp_path / "train"
    preprocess([corpus[0]], tokenizer, prefix, workers=1)
    check_tokenizer(prefix, tokenizer)
    other = load_tokenizer(hugging_face_dir)
    with pytest.raises(MinitronError, match=r"was tokenised with .*tokenizer.model") as caught:
        check_tokenizer(prefix, other)
    assert tokenizer.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    for foreign in ('{"tokenizer": "llama"}', "[]", "{}"):
        (tmp_path / "train.json").write_text(foreign)
        check_tokenizer(prefix, other)
    (tmp_path / "train.json").unlink()
    check_tokenizer(prefix, other)


def test_text_is_tokenised_once(corpus, tokenizer, hugging_face_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    root, expected = corpus
    prefix = tokenised_prefix(root, tokenizer, workers=1)
    assert prefix.parent == tmp_path / "cache"
    assert len(read_documents(prefix)) == len(expected)

    def refuse(*_):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "_preprocess", refuse)
        assert tokenised_prefix(root, tokenizer) == prefix
        (root / "notes.md").write_text("changed, but still not data")
        assert tokenised_prefix(root.rename(tmp_path / "moved"), tokenizer) == prefix
    root = tmp_path / "moved"
    assert tokenised_prefix(root, load_tokenizer(hugging_face_dir)) != prefix
    assert tokenised_prefix(root, tokenizer, cache_dir=tmp_path / "c2").name == prefix.name
    (root / "c.txt").write_text("changed")
    assert tokenised_prefix(root, tokenizer) != prefix


def test_token_files_are_taken_as_they_are(write_tokens, tokenizer, tmp_path):
    prefix = write_tokens([[1, 2, 3]])
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        assert tokenised_prefix(path, None) == prefix
    (tmp_path / "tokens").mkdir()  # files win over a directory of the same name
    assert tokenised_prefix(prefix, tokenizer) == prefix


def test_paths_that_are_no_data_are_refused(write_tokens, corpus, tokenizer, tmp_path):
    with pytest.raises(MinitronError, match=r"nowhere does not exist; data is .*prefix of a"):
        tokenised_prefix(tmp_path / "nowhere", tokenizer)
    with pytest.raises(MinitronError, match=r"corpus is text, but there is no tokenizer"):
        tokenised_prefix(corpus[0], None)
    prefix = write_tokens([[1, 2, 3]])
    (tmp_path / "tokens.idx").unlink()
    for path in (prefix, f"{prefix}.bin"):
        with pytest.raises(MinitronError, match=r"tokens\.idx does not exist"):
            TokenStream(tokenised_prefix(path, None))
