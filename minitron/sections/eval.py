"""What a model is measured on beside data."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Tasks of the lm-evaluation-harness."""

    names: list[str] = field(default_factory=list)
    """Tasks or groups, such as winogrande or your own; needs the extra `eval`. Those that generate
    text are decoded greedily, without parallel.sequence_parallel."""
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
