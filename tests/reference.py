"""What a training run must compute: the same in transformers and plain PyTorch, on one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from minitron.data.batches import Batch
from minitron.train.optimizer import learning_rate
from tests.runs import Run, open_batches


def language_modeling_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Next-token cross-entropy [b, s], in fp64 from the logits on."""
    logits = model(batch.tokens).logits.double()
    return F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


def distillation_loss(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM, batch: Batch, temperature: float = 1.0
) -> Tensor:
    """Forward KL(teacher || student) [b, s], in fp64 from the logits on."""
    with torch.no_grad():
        target = F.log_softmax(teacher(batch.tokens).logits.double() / temperature, -1)
    output = F.log_softmax(model(batch.tokens).logits.double() / temperature, -1)
    return F.kl_div(output, target, log_target=True, reduction="none").sum(-1)


def masked_mean(losses: Tensor, batch: Batch) -> Tensor:
    """Mean over the labels that count."""
    return (losses * batch.loss_mask).sum() / batch.loss_mask.sum()


def global_batch(run: Run, first: int) -> Batch:
    """All samples of a step, from sample `first` on, as one batch."""
    parts = list(open_batches(run).microbatches(first))
    return Batch(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def train(
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    run: Run,
    changed: Run | None = None,
    changed_at: int = 0,
) -> list[dict[str, float]]:
    """Train `model` in place on whole global batches; loss and gradient norm of every step.

    From step `changed_at` on it is the run `changed`, at the same place of the data.
    """
    config = run.train
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    records = []
    tokens = 0
    for step in range((changed or run).train.steps):
        if changed is not None and step == changed_at:
            run, config = changed, changed.train
        batch = global_batch(run, tokens // run.seq_length)
        tokens += batch.tokens.numel()
        if teacher is None:
            losses = language_modeling_loss(model, batch)
        else:
            losses = distillation_loss(model, teacher, batch)
        loss = masked_mean(losses, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config)
        optimizer.step()
        records.append({"loss": loss.item(), "grad_norm": norm.item()})
    return records
