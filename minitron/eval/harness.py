"""The lm-evaluation-harness, given functions that score and continue; needs the extra `eval`.

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
import lm_eval.api.task
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.eval.answers import Question
from minitron.eval.loglikelihood import Request
from minitron.eval.tasks import TaskResults
from minitron.sections.eval import TaskConfig

Score = Callable[[Sequence[Request]], list[tuple[float, bool]]]
Answer = Callable[[Sequence[Question]], list[str]]

# It shows a bar for each task before the model is asked anything; ours shows what takes long.
lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)

_MAX_NEW_TOKENS = 256  # of an answer, where the task does not say; the harness's default
_DRAWS = ("top_k", "top_p", "min_p")  # of no effect on the likeliest token


class HarnessModel(TemplateLM):
    """A model as the harness sees it.

    Args:
        tokenizer: the model's.
        score: log-probability and greediness of each request.
        answer: continues each question.
        max_length: tokens that the model takes.
    """

    def __init__(self, tokenizer: Tokenizer, score: Score, answer: Answer, max_length: int) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._score = score
        self._answer = answer
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
        """The model's greedy continuation of each text, up to the first of the task's ends."""
        return self._answer([self._question(*request.args) for request in requests])

    def _question(self, text: str, options: dict[str, Any]) -> Question:
        """A request in tokens; what does not fit before the answer is cut from the left.

        Raises:
            MinitronError: the task wants more than greedy decoding, or longer answers than fit.
        """
        normal: dict[str, Any] = dict(normalize_gen_kwargs(options, _MAX_NEW_TOKENS))
        until, limit = normal.pop("until"), normal.pop("max_gen_toks")
        drawn = normal.pop("do_sample") or normal.pop("temperature", 0.0) > 0
        if drawn or normal.keys() - {"temperature", *_DRAWS}:
            raise MinitronError(
                f"a task generates with {options}; here a task's generation_kwargs may hold until, "
                "max_gen_toks and do_sample: false: leave the task out, or copy it without the rest"
            )
        if not 0 < limit < self._max_length:
            raise MinitronError(
                f"a task's answers may have {limit} tokens, which leaves its questions no place "
                f"among the {self._max_length} that the model takes (max_position_embeddings); "
                "lower the task's max_gen_toks"
            )
        tokens = self.tok_encode(text)[limit - self._max_length :] or [self.prefix_token_id]
        return Question(tokens, tuple(end for end in until if end), limit)


def load_tasks(config: TaskConfig) -> list[Task | Group]:
    """The recipe's tasks and groups of tasks, with their data.

    Raises:
        MinitronError: a task is unknown, or its data cannot be had.
    """
    datasets.disable_progress_bars()
    directory = None if config.include_path is None else str(config.include_path)
    manager = _task_manager(directory, config.names)
    loaded: list[Task | Group] = []
    for name in config.names:
        try:
            found = manager.load([name])
        except OSError as error:  # a missing file, or a hub that cannot be reached
            raise MinitronError(
                f"the data of the task {name} cannot be had ({' '.join(str(error).split())}); "
                "correct the task's data_files, or go online once"
            ) from None
        loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    return loaded


def generate_text(tasks: Sequence[Task | Group]) -> bool:
    """True where one of the tasks does."""
    single = itertools.chain(
        *(task.get_all_tasks() if isinstance(task, Group) else [task] for task in tasks)
    )
    return any(task.get_config("output_type") == "generate_until" for task in single)


def run_tasks(
    tasks: Sequence[Task | Group], config: TaskConfig, model: HarnessModel
) -> TaskResults:
    """Run loaded tasks in this process.

    Raises:
        MinitronError: a task generates text as it is not generated here.
    """
    found = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        task_manager=TaskManager(include_defaults=False),  # it has nothing to load
        log_samples=False,
        bootstrap_iters=1000,
    )
    numbers = {
        task: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float)
        }
        for task, values in found["results"].items()
    }
    return {task: values for task, values in numbers.items() if values}  # some groups have none


def _task_manager(directory: str | None, names: Sequence[str]) -> TaskManager:
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
