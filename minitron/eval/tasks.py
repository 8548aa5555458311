"""Accuracy on tasks of the lm-evaluation-harness, with the model sharded as it is.

Rank 0 drives the harness: it alone loads tasks and data. The token ids of what it asks go to all
ranks, which compute together; the others wait for them and do nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron import metrics
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.eval.loglikelihood import Request, score_continuations
from minitron.model.llama import LlamaModel
from minitron.parallel import is_rank_zero, on_rank_zero

TaskResults = dict[str, dict[str, float]]
"""Of each task (or group of tasks), its metrics: `acc`, `acc_stderr`, ..."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Tasks of the lm-evaluation-harness."""

    names: list[str] = field(default_factory=list)
    """Tasks or groups, such as winogrande or your own; needs the extra `eval`."""
    include_path: Path | None = None
    """A directory of task files (YAML) beside those that the harness knows. With `dataset_path:
    json` and `data_files` a task reads local files, and nothing is downloaded."""
    num_fewshot: int | None = None
    """Examples in front of each question; null leaves it to the task."""
    limit: int | None = None
    """Questions of each task, the first ones; null for all."""

    def __post_init__(self) -> None:
        for name, lowest in (("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise MinitronError(f"tasks.{name}={value} must be at least {lowest}")
        if not self.names:
            return
        if importlib.util.find_spec("lm_eval") is None:
            raise MinitronError(
                f"tasks.names={self.names} needs the lm-evaluation-harness; "
                "pip install 'minitron[eval]'"
            )
        if self.include_path is not None and not self.include_path.is_dir():
            raise MinitronError(
                f"tasks.include_path={self.include_path} is not a directory; give one of task files"
            )


def evaluate_tasks(
    model: LlamaModel, tokenizer: Tokenizer | None, config: TaskConfig, *, micro_batch_size: int
) -> TaskResults:
    """Measure a frozen model on tasks; all ranks call this and get the same.

    Raises:
        MinitronError: a task is unknown, its data cannot be had, it generates text, or the model
            has no tokenizer.
    """
    if tokenizer is None:
        raise MinitronError(
            "tasks are text, but the model's directory has no tokenizer; put its tokenizer.json or "
            "tokenizer.model there"
        )

    def score(requests: Sequence[Request]) -> list[tuple[float, bool]]:
        return score_continuations(model, requests, micro_batch_size=micro_batch_size)

    if not is_rank_zero():
        while (requests := on_rank_zero(_end)) is not None:  # rank 0 says what it is
            score(requests)
        return on_rank_zero(dict)

    def shared_score(requests: Sequence[Request]) -> list[tuple[float, bool]]:
        on_rank_zero(lambda: requests)
        return score(requests)

    results: TaskResults = {}
    failure: Exception | None = None
    try:
        from minitron.eval.harness import run_tasks  # imports lm-eval

        results = run_tasks(
            config, tokenizer, shared_score, max_length=model.arch.max_position_embeddings
        )
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


def _end() -> Sequence[Request] | None:
    """In the place of requests: there are no more."""
    return None
