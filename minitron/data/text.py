"""Text on disk: which files hold it, where one document ends, what its bytes mean.

Documents are found by one process and decoded by many: reading yields bytes with their place, and
whoever has the time turns them into text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from minitron.errors import MinitronError

SUFFIXES = (".txt", ".jsonl")
TEXT_FORMS = (
    "a .txt file (one document), a .jsonl file (one document a line, in the field `text` or in "
    "`prompt` and `response`), or a directory of such files"
)


class RawDocument(NamedTuple):
    """A document as its file holds it."""

    place: str
    """The file, with the line where it has several documents."""
    data: bytes
    is_json: bool

    def parts(self) -> tuple[str, ...]:
        """Decode the document: its text, or a prompt and the response to it.

        Returns:
            One or two texts; none for a blank line of a `.jsonl` file.

        Raises:
            MinitronError: it is not UTF-8, or not a JSON object with such texts.
        """
        return tuple(self.fields(("text",), ("prompt", "response")).values())

    def fields(self, *choices: tuple[str, ...]) -> dict[str, str]:
        """Decode the document: the first of several choices of fields that it has.

        A `.txt` file is a document with the field `text`, a blank line of a `.jsonl` file one
        without any.

        Raises:
            MinitronError: it is not UTF-8, or not a JSON object with texts in such fields.
        """
        if self.is_json and not self.data.strip():
            return {}
        try:
            return self._json_fields(choices) if self.is_json else {"text": self.data.decode()}
        except UnicodeDecodeError as error:
            raise MinitronError(
                f"{self.place}: byte {error.start} is not UTF-8 ({error.reason}); "
                "convert the file to UTF-8"
            ) from None

    def _json_fields(self, choices: tuple[tuple[str, ...], ...]) -> dict[str, str]:
        try:
            record = json.loads(self.data)
        except json.JSONDecodeError as error:
            raise MinitronError(
                f"{self.place}: not valid JSON ({error.msg} at column {error.colno}); "
                "every line of a .jsonl file is one JSON object"
            ) from None
        has = record if isinstance(record, dict) else {}
        texts = {name: text for name, text in has.items() if isinstance(text, str)}
        fields = next((names for names in choices if texts.keys() >= set(names)), None)
        if fields is None:
            found = f"keys {', '.join(record)}" if isinstance(record, dict) else "no object"
            wanted = ", or ".join(" and ".join(f"`{name}`" for name in names) for names in choices)
            raise MinitronError(
                f"{self.place}: there is no text in the fields {wanted} ({found}); "
                "every line of a .jsonl file holds its document there"
            )
        for name in fields:
            try:
                texts[name].encode()
            except UnicodeEncodeError as error:
                raise MinitronError(
                    f"{self.place}: `{name}` holds half a surrogate pair at character "
                    f"{error.start}, which is no Unicode text; repair or drop that line"
                ) from None
        return {name: texts[name] for name in fields}


def find_files(path: Path) -> list[Path]:
    """The text files that `path` stands for; those below a directory in sorted order.

    Raises:
        MinitronError: there is nothing to read at `path`.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise MinitronError(f"{path} holds no .txt or .jsonl file; give {TEXT_FORMS}")
    elif not path.exists():
        raise MinitronError(f"{path} does not exist; give {TEXT_FORMS}")
    elif path.suffix not in SUFFIXES:
        raise MinitronError(f"{path} is neither .txt nor .jsonl; give {TEXT_FORMS}")
    else:
        files = [path]
    for file in files:
        if not os.access(file, os.R_OK):
            raise MinitronError(f"{file} cannot be read; change its permissions")
    return files


def read_raw(files: Iterable[Path]) -> Iterator[RawDocument]:
    """Every document of `files`, in order, not decoded yet; their bytes add up to the files'."""
    for file in files:
        if file.suffix == ".txt":
            yield RawDocument(str(file), file.read_bytes(), is_json=False)
        else:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield RawDocument(f"{file}:{number}", line, is_json=True)
