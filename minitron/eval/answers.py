"""What a model goes on with, greedily: what tasks that generate text are made of.

Questions that are cut at the same texts and lengths go through the decoder together, longest first,
so that those of a batch begin at about the same place. Data-parallel ranks share the batches; every
rank gets all answers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from minitron.data.tokenizer import Tokenizer
from minitron.metrics import progress
from minitron.model.generation import Prompt, generate
from minitron.model.llama import LlamaModel
from minitron.sections.generate import SamplingConfig

_CHARACTER = 4  # tokens that spell one, at most: the bytes of UTF-8


class Question(NamedTuple):
    """A text to continue."""

    tokens: list[int]
    """At least one, with room for the answer in the model's context."""
    until: tuple[str, ...]
    """Texts that end the answer and do not belong to it; so does the end of the document."""
    max_new_tokens: int
    """Tokens after which it is cut."""


def answer_questions(
    model: LlamaModel, tokenizer: Tokenizer, questions: Sequence[Question], *, micro_batch_size: int
) -> list[str]:
    """The likeliest next token again and again; collective.

    Args:
        model: this rank's part, frozen, built of plain layers (`transformer_impl="local"`) and
            without sequence parallelism.
        tokenizer: its tokenizer.
        questions: the same on all ranks.
        micro_batch_size: questions that one data-parallel rank takes through the model at a time,
            for each of its stages.

    Returns:
        In the order of the questions, the same on all ranks.
    """
    topology = model.topology
    share = micro_batch_size * topology.pp_size
    order = sorted(range(len(questions)), key=lambda i: _likeness(questions[i]))
    mine: list[tuple[int, str]] = []
    bar = progress(total=len(questions), desc="tasks", unit="requests", transient=True)
    for (until, limit), group in itertools.groupby(order, key=lambda i: questions[i][1:]):
        numbers = list(group)
        sampling = SamplingConfig(max_new_tokens=limit, temperature=0.0)
        batches = [numbers[i : i + share] for i in range(0, len(numbers), share)]
        for batch in batches[topology.dp_rank :: topology.dp_size]:
            responses = generate(
                model,
                [Prompt(i, questions[i].tokens) for i in batch],
                sampling,
                eod=tokenizer.eod,
                seed=0,
                micro_batch_size=micro_batch_size,
                stop=functools.partial(_is_cut, tokenizer, until),
            )
            for i, response in zip(batch, responses, strict=True):
                text = tokenizer.decode(response.tokens, special_tokens=False)
                mine.append((i, _cut(text, until)))
            bar.update(topology.dp_size * len(batch))  # the others are about as far
    bar.close()
    gathered: list[list[tuple[int, str]]] = [[] for _ in range(topology.dp_size)]
    dist.all_gather_object(gathered, mine, group=topology.groups.dp)
    answers = dict(itertools.chain(*gathered))
    return [answers[i] for i in range(len(questions))]


def _likeness(question: Question) -> tuple:
    return (question.until, question.max_new_tokens, -len(question.tokens))


def _is_cut(tokenizer: Tokenizer, until: Sequence[str], tokens: list[int]) -> bool:
    """Whether one of the ends is in the text, in which none was without its last token.

    An end that is new reaches into the text of the last token, or into a character that this one
    completes. So the text of some last tokens tells, if it is like that of all: if no character is
    cut in it, and if in front of what the last token can change there is room for an end, for the
    rest of a character, and for a space that decoders drop in front.
    """
    if not until:
        return False
    longest = max(map(len, until))
    size = longest + 2 * _CHARACTER
    while size < len(tokens):
        text = tokenizer.decode(tokens[-size:])
        before = tokenizer.decode(tokens[-size:-_CHARACTER])
        if "\N{REPLACEMENT CHARACTER}" in text or len(before) < longest + _CHARACTER:
            size *= 2
        elif any(end in text for end in until):
            break
        else:
            return False
    text = tokenizer.decode(tokens)
    return any(end in text for end in until)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text in front of the first end."""
    for end in until:
        text = text.split(end)[0]
    return text
