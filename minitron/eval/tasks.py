"""Accuracy on tasks of the lm-evaluation-harness, with the model sharded as it is.

Rank 0 drives the harness: it alone loads tasks and data, once for all models that are measured. The
token ids of what it asks go to all ranks, which compute together; the others wait for them and do
nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from minitron import metrics
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.eval.answers import answer_questions
from minitron.eval.loglikelihood import score_continuations
from minitron.model.llama import LlamaModel
from minitron.parallel import is_rank_zero, on_rank_zero
from minitron.sections.eval import TaskConfig
from minitron.sections.parallel import ParallelConfig

TaskResults = dict[str, dict[str, float]]
"""Of each task (or group of tasks), its metrics: `acc`, `acc_stderr`, ..."""


class Tasks:
    """A recipe's tasks, loaded once; call everything on all ranks.

    Args:
        config: the `tasks` section.
        tokenizer: of the models to measure.
        parallel: how they are to be shared out.

    Raises:
        MinitronError: there is no tokenizer, a task is unknown, its data cannot be had, or it
            generates text, and ranks are to share a sequence.
    """

    def __init__(
        self, config: TaskConfig, tokenizer: Tokenizer | None, parallel: ParallelConfig
    ) -> None:
        if tokenizer is None:
            raise MinitronError(
                f"tasks.names={config.names} are text, but the model's directory has no tokenizer; "
                "put its tokenizer.json or tokenizer.model there"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._loaded: list[Any] = []

        def load() -> bool:
            from minitron.eval import harness  # imports lm-eval

            self._loaded = harness.load_tasks(config)
            return harness.generate_text(self._loaded)

        self.generate_text = on_rank_zero(load)
        """Whether one of them does, for which a model needs plain layers."""
        if self.generate_text and parallel.sequence_parallel:
            raise MinitronError(
                f"tasks.names={config.names} generate text, token by token, which leaves no "
                "sequence to share; leave parallel.sequence_parallel out"
            )

    def evaluate(self, model: LlamaModel, *, micro_batch_size: int) -> TaskResults:
        """Measure a frozen model; all ranks get the same.

        Raises:
            MinitronError: a task asks for what is not done here.
        """
        tokenizer = self._tokenizer
        compute: dict[str, Callable[[list], list]] = {
            "score": functools.partial(
                score_continuations, model, micro_batch_size=micro_batch_size
            ),
            "answer": functools.partial(
                answer_questions, model, tokenizer, micro_batch_size=micro_batch_size
            ),
        }
        if not is_rank_zero():
            while work := on_rank_zero(_end):  # rank 0 says what it is
                compute[work[0]](work[1])
            return on_rank_zero(dict)

        def share(kind: str, requests: list) -> list:
            on_rank_zero(lambda: (kind, requests))
            return compute[kind](requests)

        results: TaskResults = {}
        failure: Exception | None = None
        try:
            from minitron.eval.harness import HarnessModel, run_tasks

            length = model.arch.max_position_embeddings
            score, answer = (functools.partial(share, kind) for kind in ("score", "answer"))
            seen = HarnessModel(tokenizer, score, answer, length)
            results = run_tasks(self._loaded, self._config, seen)
        except Exception as error:
            failure = error
        on_rank_zero(_end)

        def outcome() -> TaskResults:
            if failure is not None:
                raise failure
            return results

        return on_rank_zero(outcome)


def mean_metric(results: TaskResults, metric: str) -> float:
    """The mean of a metric over all tasks.

    Raises:
        MinitronError: a task has no such metric.
    """
    for task, values in results.items():
        if metric not in values:
            raise MinitronError(
                f"depth.metric={metric} is none of task {task}'s, which has "
                f"{', '.join(name for name in values if not name.endswith('_stderr'))}"
            )
    return sum(values[metric] for values in results.values()) / len(results)


def task_table(results: TaskResults) -> str:
    """A line for every task and metric, with its standard error where there is one."""
    rows = [
        (task, metric, value, values.get(f"{metric}_stderr", ""))
        for task, values in results.items()
        for metric, value in values.items()
        if not metric.endswith("_stderr")
    ]
    return metrics.format_table(("task", "metric", "value", "standard error"), rows)


def _end() -> tuple[str, list] | None:
    """In the place of requests and their kind: there are no more."""
    return None
