"""Tokenizers: Hugging Face's `tokenizer.json` and sentencepiece's `.model` behind one interface.

`encode` never adds a BOS or EOS token. What ends a document is decided where documents are
joined (`minitron.data.preprocess`), with the tokenizer's `eod`.
"""

from __future__ import annotations

import abc
import io
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from minitron import artifact
from minitron.errors import MinitronError

HUGGING_FACE_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Where tokenizer.json lies without a config: Llama 3, Llama 2, GPT-2.
_WELL_KNOWN_EOD = ("<|end_of_text|>", "</s>", "<|endoftext|>")

# A trained tokenizer sees pieces of whole lines, this long, and at most this many of them.
_TRAINING_PIECE_CHARS = 4000
_MAX_TRAINING_PIECES = 1 << 16


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    A pickled tokenizer is its path: another process loads it anew.

    Args:
        path: the tokenizer's main file.
    """

    canonical_name: str
    """What transformers calls the main file in a model directory."""
    vocab_size: int
    """Largest token id, added tokens included, plus one."""
    eod: int
    """The token that ends a document."""
    bos: int | None
    """The token that begins a text; None where there is none."""
    adds_bos: bool
    """True where transformers puts `bos` before every text; `encode` never does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = artifact.sha256(path)[:16]
        """Hash of the main file's content: the same for every copy of the tokenizer."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.path,)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""

    @abc.abstractmethod
    def decode(self, ids: list[int], *, special_tokens: bool = True) -> str:
        """The text that `ids` stand for, with that of special tokens where they have one."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that make up the tokenizer: the main one and its companions beside it."""
        companions = (self.path.parent / name for name in COMPANION_FILES)
        return (self.path, *(file for file in companions if file.exists()))

    def copy_to(self, directory: Path) -> None:
        """Copy the files byte for byte, under the names that transformers looks for."""
        for file in self.files:
            name = self.canonical_name if file == self.path else file.name
            shutil.copyfile(file, directory / name)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; its EOD comes from the configs beside it.

    Special tokens that a text spells out are taken as such, as transformers takes them.
    """

    canonical_name = HUGGING_FACE_FILE

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise MinitronError(
                f"{path} is not a Hugging Face tokenizer.json ({_one_line(error)})"
            ) from None
        # Settings for model inputs that a file may carry; documents are neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.eod = self._find_eod()
        config = _read_optional(path.parent / "tokenizer_config.json")
        token = config.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        # What the file's own template puts before a text is a special token.
        first = self._tokenizer.encode("a")
        templated = bool(first.ids) and first.special_tokens_mask[0] == 1
        self.bos = first.ids[0] if templated else token and self._tokenizer.token_to_id(token)
        self.adds_bos = self.bos is not None and config.get("add_bos_token", templated)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], *, special_tokens: bool = True) -> str:
        """The text that `ids` stand for, with that of special tokens or without."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special_tokens)

    def _find_eod(self) -> int:
        """The EOS token as the tokenizer's config names it, else the model's, else a known one."""
        directory = self.path.parent
        token = _read_optional(directory / "tokenizer_config.json").get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            return self._id_of(token, directory / "tokenizer_config.json")
        for name in ("config.json", "generation_config.json"):
            eos = _read_optional(directory / name).get("eos_token_id")
            if isinstance(eos, list):
                # Instruct models list several; the first ends a text, the others end a turn.
                eos = eos[0] if eos else None
            if isinstance(eos, int):
                return eos
        for token in _WELL_KNOWN_EOD:
            if (token_id := self._tokenizer.token_to_id(token)) is not None:
                return token_id
        raise MinitronError(
            f"{self.path} does not say which token ends a document; put a tokenizer_config.json "
            'with an "eos_token" beside it'
        )

    def _id_of(self, token: str, config: Path) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise MinitronError(
                f'{config} names the eos_token "{token}", which {self.path} does not hold; '
                "correct one of them"
            )
        return token_id


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`; its EOS piece ends documents."""

    canonical_name = SENTENCEPIECE_FILE

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            # From bytes: given a path, sentencepiece also reports a failure on stderr.
            self._processor.LoadFromSerializedProto(path.read_bytes())
            self.vocab_size = self._processor.get_piece_size()
        except RuntimeError:
            self.vocab_size = 0
        if not self.vocab_size:
            raise MinitronError(
                f"{path} is not a sentencepiece model; Llama 3's original tokenizer.model is a "
                "tiktoken file, use the tokenizer.json of its Hugging Face directory"
            )
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise MinitronError(
                f"{path} has no EOS piece to end documents with; train it with an eos_id"
            )
        bos = self._processor.bos_id()
        self.bos = bos if bos >= 0 else None
        config = _read_optional(path.parent / "tokenizer_config.json")
        self.adds_bos = self.bos is not None and config.get("add_bos_token", True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""
        return self._processor.encode(text)

    def decode(self, ids: list[int], *, special_tokens: bool = True) -> str:
        """The text that `ids` stand for; control pieces have none."""
        return self._processor.decode(ids)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a `tokenizer.json`, a sentencepiece `.model`, or the one that a directory holds.

    A directory that holds both gives its `tokenizer.json`.

    Raises:
        MinitronError: there is no tokenizer at `path`, it is damaged, or it has no EOD.
    """
    path = Path(path)
    if path.is_dir():
        for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE):
            if (path / name).exists():
                return load_tokenizer(path / name)
        raise MinitronError(
            f"{path} holds neither {HUGGING_FACE_FILE} nor {SENTENCEPIECE_FILE}; "
            "give the directory of a Hugging Face model or a tokenizer file"
        )
    if not path.exists():
        raise MinitronError(
            f"tokenizer {path} does not exist; give a directory with a tokenizer, "
            "a tokenizer.json, or a sentencepiece .model file"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise MinitronError(
        f"tokenizer {path} is neither a .json nor a .model file; give a tokenizer.json "
        "or a sentencepiece .model"
    )


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a model directory, or None where it has none."""
    names = (HUGGING_FACE_FILE, SENTENCEPIECE_FILE)
    return load_tokenizer(directory) if any((directory / n).exists() for n in names) else None


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out_dir: Path) -> None:
    """Train a byte-fallback BPE, like Llama 2's, and write it as `tokenizer.model`.

    Nothing is normalised, so that source code comes back exactly from its tokens (all but U+2581,
    which is sentencepiece's own sign for a space). The result depends on `texts` alone.

    Args:
        texts: documents. Up to about 256 million characters are used, evenly spaced over the whole.
        vocab_size: pieces in all: 3 control pieces, 256 bytes, and the rest learned.
        out_dir: an existing directory.

    Raises:
        MinitronError: the text is empty, or too small or too varied for this vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(_pieces(texts))),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _TRAINING_PIECE_CHARS,  # bytes; longer ones would be skipped
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    (out_dir / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
    artifact.write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": False,
            "add_eos_token": False,
            # Without these two, transformers puts a space in front of every text.
            "add_prefix_space": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
        },
    )


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut documents into pieces, at line ends where there are any.

    Inside a piece sentencepiece learns line breaks with the indentation that follows; it drops
    those at the end of a piece, so single lines would not do.
    """
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > _TRAINING_PIECE_CHARS:
                yield piece
                piece = ""
            piece += line
            while len(piece) > _TRAINING_PIECE_CHARS:
                yield piece[:_TRAINING_PIECE_CHARS]
                piece = piece[_TRAINING_PIECE_CHARS:]
        if piece:
            yield piece


def _sample(pieces: Iterable[str]) -> list[str]:
    """Every k-th piece, for the smallest power of two k that keeps them below the maximum.

    sentencepiece's own sampling draws a new random seed in every process.
    """
    kept: list[str] = []
    stride = 1
    for index, piece in enumerate(pieces):
        if index % stride:
            continue
        kept.append(piece)
        if len(kept) == _MAX_TRAINING_PIECES:
            kept, stride = kept[::2], 2 * stride
    return kept


def _training_error(message: str, vocab_size: int) -> MinitronError:
    """Say what sentencepiece's failed assertion means."""
    if match := re.search(r"set it to a value <= (\d+)", message):
        return MinitronError(
            f"tokenizer.train_vocab_size={vocab_size} is more than this text can fill; "
            f"give more text or at most {match[1]}"
        )
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return MinitronError(
            f"tokenizer.train_vocab_size={vocab_size} cannot hold 3 control pieces, 256 bytes and "
            f"the characters of this text; give at least {match[1]}"
        )
    if "!sentences_.empty()" in message:
        return MinitronError("there is no text to train a tokenizer on; the input is empty")
    return MinitronError(f"sentencepiece cannot train on this text ({_one_line(message)})")


def _read_optional(path: Path) -> dict[str, Any]:
    content = artifact.read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise MinitronError(f"{path} does not hold a JSON object")
    return content


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
