"""The training loop: every stage that trains runs this one, with another objective."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from minitron import parallel, platform
from minitron.data.batches import Batch, EvalBatches, TrainBatches
from minitron.errors import Diverged, MinitronError, Stopped
from minitron.eval.perplexity import evaluate
from minitron.metrics import METRICS, MetricsWriter, log, progress, read_metrics
from minitron.model.llama import LlamaModel
from minitron.model.schedule import TokenMeans, run_schedule
from minitron.sections.train import TrainConfig
from minitron.stage import StopRequest
from minitron.train.checkpoint import (
    ModelFiles,
    Position,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from minitron.train.objective import Objective
from minitron.train.optimizer import (
    build_optimizer,
    learning_rate,
    set_learning_rate,
    unhook_optimizer,
    wrap_chunk,
)

CHECKPOINTS = "checkpoints"


class Trainer:
    """A model, what it minimises, and the steps that do it.

    Args:
        model: this rank's chunks, with their initial weights.
        objective: the loss.
        batches: training data of this data-parallel rank.
        validation: held-out data; None measures nothing.
        config: steps, learning rate, intervals.
        out: the run's directory; it exists.
        files: config and tokenizer, for checkpoints that can be exported by themselves.
    """

    def __init__(
        self,
        model: Sequence[LlamaModel],
        objective: Objective,
        batches: TrainBatches,
        validation: EvalBatches | None,
        config: TrainConfig,
        out: Path,
        files: ModelFiles | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.batches = batches
        self.validation = validation
        self.config = config
        self.checkpoints = out / CHECKPOINTS
        self.out = out
        self.files = files
        self.position = Position()
        self._stop = StopRequest()
        self._stops = False  # as all ranks have agreed
        self._saved_step = 0
        self._has_skipped = False
        self.wrapped = [wrap_chunk(chunk) for chunk in model]
        self.optimizer = build_optimizer(self.wrapped, config)
        platform.keep_freed_memory()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.position.step

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.config.global_batch_size * self.batches.seq_length

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run, if there is one.

        Raises:
            MinitronError: it is damaged, or beyond the last step.
        """
        steps = list_checkpoints(self.checkpoints)
        if steps:
            path = checkpoint_path(self.checkpoints, steps[-1])
            self.position = load_checkpoint(path, self.model, self.optimizer)
            self._saved_step = self.step
            log(f"resumed from {path} at step {self.step}")
        if self.step > self.config.steps:
            raise MinitronError(
                f"train.steps={self.config.steps} is less than the {self.step} steps that the run "
                "has done; raise it"
            )

    def run(self, until_step: int | None = None) -> dict[str, Any]:
        """Train to the last step, validating and saving on the way.

        If any rank receives a signal to stop (`minitron.stage.STOP_SIGNALS`), all finish the step
        under way, or leave the validation under way, and save a checkpoint. The resumed run begins
        with the validation that is missing.

        Args:
            until_step: stop there, validated and with a checkpoint to go on from; the learning
                rate is still on its way to the last step. A run that is beyond it stays where it
                is. None goes to the last step.

        Returns:
            The last validation's losses (empty without validation data), and `tokens`.

        Raises:
            Diverged: a loss or the gradient norm is not finite; on all ranks alike.
            Stopped: by a signal; a run resumed from the checkpoint ends as this one would have. In
                the last step of all, a signal stops nothing but its validation.
        """
        config = self.config
        end = config.steps if until_step is None else min(until_step, config.steps)
        end = max(end, self.step)
        enabled = parallel.is_rank_zero()
        writer = MetricsWriter(self.out, enabled=enabled, append=self.step > 0)
        remaining = (end - self.step) * self.tokens_per_step
        bar = progress(
            total=self.position.tokens + remaining,
            initial=self.position.tokens,
            desc="train",
            unit="tokens",
            enabled=enabled,
        )
        validated: dict[str, float] = {}
        with contextlib.closing(writer), bar, self._stop:
            if self.step > 0:
                writer.truncate_after(self.step)
            if self.step == 0 or (self._is_validated_at(end) and not self._has_validation()):
                validated = self._validate(writer)
            elif self.step == end:  # resumed when all was done: its record is there
                validated = self._validate(None)
            while self.step < end:
                record = self.train_step()
                writer.write(record)
                shown = {name: record[name] for name in ("loss", "grad_norm") if name in record}
                bar.update(self.tokens_per_step, step=self.step, **shown)
                last = self.step == end
                if self._stops and not last:
                    self._end_stopped()
                if self._is_validated_at(end):
                    validated = self._validate(writer)
                if (last and (until_step is not None or self._stops)) or (
                    config.checkpoint_interval
                    and (last or self.step % config.checkpoint_interval == 0)
                ):
                    self._save_checkpoint()
            if until_step is not None:
                self._heed_signals()
        return {**validated, "tokens": self.position.tokens}

    def close(self) -> None:
        """End training for good, so that model and optimizer can be freed."""
        unhook_optimizer(self.wrapped)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on one global batch; what `metrics.jsonl` says of it."""
        platform.synchronize()
        start = time.perf_counter()
        microbatches = list(self.batches.microbatches(self._next_sample()))
        means = TokenMeans(self.objective.training_losses, self.model[-1].topology)
        minimised = self.objective.training_losses[0]

        def on_output(hidden: Tensor, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
            losses = self.objective.training(self.model[-1], hidden, batch, index)
            means.add(losses, batch.loss_mask)
            total = (losses[minimised] * batch.loss_mask.t()).sum()
            return total, batch.loss_mask.sum().to(torch.int)

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        run_schedule(
            self.wrapped,
            microbatches,
            on_output,
            forward_only=False,
            window=self.objective.window(microbatches),
            prepare=self.objective.prepare,
        )
        self.position = Position(self.step + 1, self.position.tokens + self.tokens_per_step)
        losses = means.reduce(vote=self._stop.received)
        self._stops = means.votes > 0
        outcome = self._update(losses) if losses.pop("tokens") else self._skip()
        platform.synchronize()
        return {
            "step": self.step,
            **outcome,
            "tokens": self.position.tokens,
            "tokens_per_second": self.tokens_per_step / (time.perf_counter() - start),
            "peak_memory_gb": platform.peak_memory_bytes() / 1e9,
        }

    def _update(self, losses: dict[str, float]) -> dict[str, float]:
        """Learn from the gradients of a step with these mean losses; what to log of it."""
        lr = learning_rate(self.step, self.config)
        set_learning_rate(self.optimizer, lr)
        _, grad_norm, _ = self.optimizer.step()
        losses = self.objective.finish(losses)
        loss = losses[self.objective.training_losses[0]]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._diverged(f"the loss is {loss:g} and the gradient norm {grad_norm:g}")
        return {**losses, "lr": lr, "grad_norm": float(grad_norm)}

    def _skip(self) -> dict[str, float]:
        """Pass over a step without a label that counts, as long prompts may fill one."""
        if not self._has_skipped:
            self._has_skipped = True
            log(
                f"step {self.step} is skipped: none of the labels in its "
                f"{self.config.global_batch_size} samples counts, they are all of prompts; "
                "metrics.jsonl says `skipped` of this and any other such step"
            )
        return {"skipped": 1}

    def _heed_signals(self) -> None:
        """End the run on all ranks if a signal has come to one."""
        if parallel.any_rank(self._stop.received):
            self._end_stopped()

    def _end_stopped(self) -> NoReturn:
        """End the run on all ranks, as it has to be resumed; a start needs no checkpoint."""
        if self.step != self._saved_step:
            self._save_checkpoint()
        log(f"stopped by a signal at step {self.step}, from where --resume goes on")
        parallel.barrier()  # where one rank ends, torchrun ends the others
        raise Stopped

    def _next_sample(self) -> int:
        """Where the next global batch begins.

        Counted in tokens, so that batches or samples of another size continue where those before
        them ended.
        """
        return self.position.tokens // self.batches.seq_length

    def _is_validated_at(self, end: int) -> bool:
        """Whether the run is validated at this step, if it ends at `end`."""
        interval = self.config.valid_interval
        return self.step == end or bool(interval and self.step % interval == 0)

    def _has_validation(self) -> bool:
        """Whether an earlier attempt came to the end of this step's validation."""

        def look() -> bool:
            path, loss = self.out / METRICS, self.objective.validation_losses[0]
            records = read_metrics(path) if path.exists() else []
            return any(r.get("step") == self.step and loss in r for r in records)

        return parallel.on_rank_zero(look)

    def _validate(self, writer: MetricsWriter | None) -> dict[str, float]:
        if self.validation is None:
            return {}
        losses = evaluate(
            self.model,
            self.validation,
            self.objective.validation,
            self.objective.validation_losses,
            window=self.objective.window,
            prepare=self.objective.prepare,
            check=self._heed_signals,
        )
        if not losses.pop("tokens"):
            raise MinitronError(
                "none of the labels in data.valid_path counts, they are all of prompts; give data "
                "with responses, or none"
            )
        if not all(map(math.isfinite, losses.values())):
            raise self._diverged(", ".join(f"{k} is {v:g}" for k, v in losses.items()))
        if writer is not None:
            writer.write({"step": self.step, "tokens": self.position.tokens, **losses})
        log(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
        return losses

    def _diverged(self, found: str) -> Diverged:
        if not self.step:
            return Diverged(f"before the first step {found}; look at the model and the data")
        return Diverged(
            f"at step {self.step} {found}; lower train.lr={self.config.lr:g} or look at the data, "
            "and start another run"
        )

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.checkpoints,
            self.position,
            self.model,
            self.optimizer,
            files=self.files,
            keep=self.config.keep_checkpoints,
        )
        self._saved_step = self.step
