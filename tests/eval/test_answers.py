"""Where an answer ends is told from its last tokens, as it would be from all of them."""

import inspect
import random
import textwrap

import pytest
import tokenizers
from tokenizers import decoders, models

from minitron.data.tokenizer import find_tokenizer, train_sentencepiece
from minitron.eval import answers

TEXT = inspect.getsource(textwrap) + "Où? 中文 😀, naïve — ¿qué?  \n\n" * 40


def _byte_level(directory):
    """As Llama 3's: a token may end amid a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def _byte_fallback(directory):
    """As Llama 2's: a wrong byte spoils all bytes beside it; a space in front is dropped."""
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁of", "re", "é"]
    pieces += [chr(letter) for letter in range(97, 123)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))


def _sentencepiece(directory):
    train_sentencepiece([TEXT], 420, directory)


@pytest.fixture(scope="module", params=[_byte_level, _byte_fallback, _sentencepiece])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    request.param(directory)
    if request.param is not _sentencepiece:
        eos = {_byte_level: "<|end_of_text|>", _byte_fallback: "</s>"}[request.param]
        (directory / "tokenizer_config.json").write_text(f'{{"eos_token": "{eos}"}}')
    return find_tokenizer(directory)


def _length(is_cut, tokens):
    """Tokens of an answer when it is cut; None if it is not."""
    return next((n for n in range(1, len(tokens) + 1) if is_cut(tokens[:n])), None)


def _answer(tokenizer, draw):
    """Tokens of a text, of arbitrary ones, or of both in turns."""
    tokens = []
    while len(tokens) < 60:
        start = draw.randrange(len(TEXT))
        tokens += tokenizer.encode(TEXT[start : start + draw.randrange(40)])
        if draw.random() < 0.5:
            tokens += [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(6))]
    return tokens


def test_an_answer_is_cut_where_its_whole_text_says(tokenizer):
    draw = random.Random(5)
    cut = 0
    for _ in range(150):
        tokens = _answer(tokenizer, draw)
        text = tokenizer.decode(tokens)
        ends = [text[i : i + draw.randrange(1, 9)] for i in draw.choices(range(len(text)), k=2)]
        until = tuple(end for end in [*ends, "never"] if end)

        def by_all(seen, until=until):
            return any(end in tokenizer.decode(seen) for end in until)

        def by_some(seen, until=until):
            return answers._is_cut(tokenizer, until, seen)

        expected = _length(by_all, tokens)
        assert _length(by_some, tokens) == expected, (until, tokens)
        cut += expected is not None and expected > 20
    assert cut > 30


def test_a_long_answer_is_decoded_in_pieces(tokenizer, monkeypatch):
    tokens = tokenizer.encode(inspect.getsource(textwrap))[:1500]
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    assert _length(lambda seen: answers._is_cut(tokenizer, ("\n\n\n\n",), seen), tokens) is None
    assert sum(decoded) < 60 * len(tokens)
    assert not answers._is_cut(tokenizer, (), tokens)
