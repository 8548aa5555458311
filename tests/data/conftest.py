"""A small text, tokenizers of both kinds for it, and token files written by megatron-core."""

import inspect
import json
import textwrap

import numpy as np
import pytest
import tokenizers

from minitron.data.indexed import TokenStream
from minitron.data.sampling import TokenWindows
from minitron.data.tokenizer import load_tokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def documents():
    """Source code: indentation, blank lines, long runs of spaces."""
    return [inspect.getsource(module) for module in (textwrap, json, inspect)]


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory, documents):
    directory = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(documents, 600, directory)
    return directory


@pytest.fixture(scope="session")
def hugging_face_dir(tmp_path_factory, documents):
    """A byte-level BPE as Llama 3 has, with its EOS, and a BOS that a template would add."""
    directory = tmp_path_factory.mktemp("hugging_face")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end_of_text|>"}})
    )
    return directory


@pytest.fixture(params=["sentencepiece_dir", "hugging_face_dir"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture
def write_tokens(tmp_path):
    """Write documents, lists of ids, with megatron-core's builder; returns the prefix."""
    from minitron import platform  # noqa: F401  before megatron.core

    # isort: split
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(docs, name="tokens", dtype=np.uint16):
        prefix = tmp_path / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for doc in docs:
            builder.add_document(np.array(doc), [len(doc)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


@pytest.fixture
def write_windows(write_tokens):
    """Windows of `count` samples whose tokens count up from `start`."""

    def write(count, *, seq_length=4, start=0, extra=0, name="tokens"):
        ids = np.arange(start, start + count * seq_length + 1 + extra)
        return TokenWindows(TokenStream(write_tokens([ids], name, np.int32)), seq_length)

    return write
