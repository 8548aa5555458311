"""The lm-evaluation-harness, given a function that scores continuations; needs the extra `eval`.

Encoding follows the harness's own Hugging Face backend to the token: what the tokenizer puts before
a text stays, spaces at the end of a context move to the continuation, and a text without context
follows BOS, or EOD where there is none.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.eval.loglikelihood import Request
from minitron.eval.tasks import TaskConfig, TaskResults

Score = Callable[[Sequence[Request]], list[tuple[float, bool]]]


class HarnessModel(TemplateLM):
    """A model as the harness sees it.

    Args:
        tokenizer: the model's.
        score: log-probability and greediness of each request.
        max_length: tokens that the model takes.
    """

    def __init__(self, tokenizer: Tokenizer, score: Score, max_length: int) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._score = score
        self._max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self._tokenizer.bos
        return self._tokenizer.eod if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, after BOS where the tokenizer puts it and the text does not spell it out."""
        ids, bos = self._tokenizer.encode(string), self._tokenizer.bos
        adds = self._tokenizer.adds_bos and add_special_tokens is not False
        return [bos, *ids] if adds and bos is not None and ids[:1] != [bos] else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log-probability and greediness of each continuation of a context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        for (_, text), _, continuation in requests:
            if not 0 < len(continuation) <= self._max_length:
                raise MinitronError(
                    f"a task's answer has {len(continuation)} tokens, the model takes 1 to "
                    f"{self._max_length} (max_position_embeddings); leave the task out: "
                    f"{text[:40]!r}"
                )
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, in windows that fill the model's context."""
        windows: list[Request] = []
        ends = [0]
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            windows += map(make_disjoint_window, rolling)
            ends.append(len(windows))
        scores = [score for score, _ in self._score(windows)]
        return [sum(scores[a:b]) for a, b in itertools.pairwise(ends)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Refuse.

        Raises:
            MinitronError: always.
        """
        raise MinitronError(
            "a task generates text, which is not evaluated here; choose tasks of log-likelihoods "
            "(multiple choice, perplexity), or run lm_eval --model hf on the model's directory"
        )


def run_tasks(
    config: TaskConfig, tokenizer: Tokenizer, score: Score, *, max_length: int
) -> TaskResults:
    """Run tasks in this process.

    Raises:
        MinitronError: a task is unknown, its data cannot be had, or it generates text.
    """
    datasets.disable_progress_bars()
    directory = None if config.include_path is None else str(config.include_path)
    manager = _task_manager(directory, tuple(config.names))
    try:
        found = simple_evaluate(
            HarnessModel(tokenizer, score, max_length),
            tasks=list(config.names),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except OSError as error:  # a missing file, or a hub that cannot be reached
        raise MinitronError(
            f"the data of tasks.names={config.names} cannot be had ({' '.join(str(error).split())})"
            "; correct the task's data_files, or go online once"
        ) from None
    numbers = {
        task: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float)
        }
        for task, values in found["results"].items()
    }
    return {task: values for task, values in numbers.items() if values}  # some groups have none


@functools.lru_cache
def _task_manager(directory: str | None, names: tuple[str, ...]) -> TaskManager:
    """An index of task files; of the harness's own thousands only where a name is not in ours."""
    if directory is not None:
        manager = TaskManager(include_path=directory, include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    manager = TaskManager(include_path=directory)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else "; give tasks.include_path"
            raise MinitronError(f"the harness knows no task {name}{hint}")
    return manager
