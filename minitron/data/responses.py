"""Prompts to continue, and the responses to them as training data.

`responses.jsonl` grows with every batch, in the order of the prompts, so that what a killed run has
written is where the next one begins. When all prompts are answered, the same tokens become
`responses.bin/.idx`, whose documents are a prompt, which is not learnt, and a response.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.text import find_files, read_raw
from minitron.data.token_files import Document, write_token_files
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.sections.data import PromptConfig

RESPONSES = "responses"


def read_prompts(config: PromptConfig, tokenizer: Tokenizer, *, context: int) -> list[list[int]]:
    """The tokens of every prompt, in the order of the files.

    Args:
        config: where they are.
        tokenizer: the model's.
        context: most tokens that the model reads; a prompt leaves room for one more.

    Raises:
        MinitronError: a prompt is empty or too long, or there are none.
    """
    prompts: list[list[int]] = []
    files = [file for path in config.path for file in find_files(Path(path))]
    for document in read_raw(files):
        fields = document.fields(("prompt",), ("text",))
        if "prompt" in fields:
            tokens = tokenizer.encode(fields["prompt"])
            if not 0 < len(tokens) < context:
                raise MinitronError(
                    f"{document.place}: the prompt has {len(tokens)} tokens; the model takes "
                    f"prompts of 1 to {context - 1}: shorten it or drop the line"
                )
            prompts.append(tokens)
        elif "text" in fields:
            prompts.extend(_beginning(fields["text"], config, tokenizer, context))
        if len(prompts) == config.limit:
            break
    if not prompts:
        raise MinitronError(
            f"{', '.join(config.path)} holds no prompt; give a .jsonl file with a field `prompt`, "
            "or documents of at least prompts.tokens tokens"
        )
    return prompts


def _beginning(
    text: str, config: PromptConfig, tokenizer: Tokenizer, context: int
) -> Iterator[list[int]]:
    if config.tokens is None:
        raise MinitronError(
            "prompts.path holds texts rather than prompts; say with --prompts.tokens how many "
            "tokens of each are the prompt"
        )
    if config.tokens >= context:
        raise MinitronError(
            f"prompts.tokens={config.tokens} leaves no room in the model's context of {context}; "
            "lower it"
        )
    tokens = tokenizer.encode(text)[: config.tokens]
    if len(tokens) == config.tokens:
        yield tokens


def count_answered(path: Path, prompts: Sequence[Sequence[int]]) -> int:
    """Complete lines of a `responses.jsonl`; what a killed run left of another is cut off.

    Raises:
        MinitronError: a line is not one that `append_responses` wrote, or answers another prompt.
    """
    if not path.exists():
        return 0
    count = end = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            tokens, _, _ = _tokens_of(line, path, count + 1)
            if count >= len(prompts) or tokens != prompts[count]:
                raise MinitronError(
                    f"{path}:{count + 1} answers another prompt than prompts.path holds there; "
                    "restore the prompts or choose another --out"
                )
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def append_responses(
    path: Path, answered: Iterable[tuple[Sequence[int], Sequence[int], bool]], tokenizer: Tokenizer
) -> None:
    """Add a line for each prompt's tokens, the response's, and whether the model ended it."""
    with path.open("a", encoding="utf-8") as file:
        for prompt, response, finished in answered:
            record = {
                "prompt": tokenizer.decode(list(prompt)),
                "response": tokenizer.decode(list(response)),
                "finished": finished,
                "prompt_tokens": list(prompt),
                "response_tokens": list(response),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_responses(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Turn `responses.jsonl` into token files beside it; the number of documents and tokens.

    A response that was cut does not end with the end-of-document token, lest a student learn to
    stop there.
    """
    path = directory / f"{RESPONSES}.jsonl"

    def documents() -> Iterator[Document]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield [np.array(part, np.int32) for part in _parts(line, path, number, tokenizer)]

    record = write_token_files(directory / RESPONSES, documents(), tokenizer)
    return {name: record[name] for name in ("documents", "tokens")}


def _parts(line: bytes, path: Path, number: int, tokenizer: Tokenizer) -> list[list[int]]:
    prompt, response, finished = _tokens_of(line, path, number)
    return [prompt, [*response, tokenizer.eod] if finished else response]


def _tokens_of(line: bytes, path: Path, number: int) -> tuple[list[int], list[int], bool]:
    try:
        record = json.loads(line)
        return record["prompt_tokens"], record["response_tokens"], record["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise MinitronError(
            f"{path}:{number} is damaged ({error}); delete that line and those after it, and resume"
        ) from None
