"""What a training run must compute: the same in transformers and plain PyTorch, on one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from minitron.data.batches import Batch
from minitron.train.optimizer import learning_rate
from tests.runs import SEED, Run, open_batches


def load_fp64(path: Path) -> LlamaForCausalLM:
    """A model directory in fp64 throughout; transformers' norm would go through fp32."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    for parent in [*model.modules()]:
        for name, norm in parent.named_children():
            if isinstance(norm, modeling_llama.LlamaRMSNorm):
                exact = torch.nn.RMSNorm(norm.weight.numel(), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


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
    return concatenate(list(open_batches(run).microbatches(first)))


def concatenate(parts: Sequence[Batch]) -> Batch:
    """Micro-batches as one batch."""
    return Batch(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


class Intermediate:
    """Intermediate losses of a run, from hooks on whole models of transformers.

    Args:
        run: its `intermediate` section says what is compared.
        student: the model in training.
        teacher: the model whose states are the targets.
    """

    def __init__(self, run: Run, student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
        self.config = run.intermediate
        self.alpha = 0.0 if self.config.weight == "dynamic" else self.config.weight
        self._student, self._teacher = student, teacher
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        self.map = None
        if ours != theirs and self.config.states != ["attention_relation"]:
            normal = torch.randn(theirs, ours, generator=torch.Generator().manual_seed(SEED))
            self.map = torch.nn.Parameter((normal / ours**0.5).to(student.dtype))

    def add(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The whole loss of a global batch, and its parts; takes alpha to the next step."""
        parts = {name: masked_mean(x, batch) for name, x in self.losses(batch).items()}
        total = sum(parts.values(), torch.zeros(()))
        record = {name: x.item() for name, x in parts.items()} | {"alpha": self.alpha}
        loss = logits + self.alpha * total
        if self.config.weight == "dynamic":
            self.alpha = (logits / total).item()
        return loss, record

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses [b, s] of every pair by their names."""
        ours = _states(self._student, batch)
        with torch.no_grad():
            theirs = _states(self._teacher, batch)
        counts = len(ours["mlp_input"]), len(theirs["mlp_input"])
        found = {}
        for state in self.config.states:
            if state == "embedding":
                found["intermediate/embedding"] = self._distance(
                    ours["norms"][0], theirs["norms"][0]
                )
                continue
            for pair in self.config.layers:
                i, j = (layer % count for layer, count in zip(pair, counts, strict=True))
                name = f"intermediate/{state}_{i}"
                if state == "attention_relation":
                    found[name] = relation_distance(ours[state][i], theirs[state][j])
                elif state == "block_output":
                    found[name] = self._distance(ours["norms"][i + 1], theirs["norms"][j + 1])
                else:
                    found[name] = self._distance(ours[state][i], theirs[state][j])
        return found

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.map is not None:
            ours = ours @ self.map.T
        if self.config.loss == "mse":
            return F.mse_loss(ours, theirs, reduction="none").mean(-1)
        return 1 - (F.normalize(ours, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1)


def _states(model: LlamaForCausalLM, batch: Batch) -> dict[str, Any]:
    """Outputs of all norms [b, s, h] and (query, key, value) [b, heads, s, d] of all layers."""
    norms, mlp_inputs, values, rotated = [], [], [], []
    modules = [(layer.input_layernorm, norms) for layer in model.model.layers]
    modules += [(layer.post_attention_layernorm, mlp_inputs) for layer in model.model.layers]
    modules += [(layer.self_attn.v_proj, values) for layer in model.model.layers]
    handles = [
        module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        for module, kept in [*modules, (model.model.norm, norms)]
    ]
    rotate = modeling_llama.apply_rotary_pos_emb

    def keep(*args, **options):
        rotated.append(rotate(*args, **options))
        return rotated[-1]

    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", keep):
        model(batch.tokens)
    for handle in handles:
        handle.remove()
    d = model.model.layers[0].self_attn.head_dim
    values = [value.unflatten(-1, (-1, d)).transpose(1, 2) for value in values]
    relations = [(q, k, v) for (q, k), v in zip(rotated, values, strict=True)]
    return {"norms": norms, "mlp_input": mlp_inputs, "attention_relation": relations}


def relation_distance(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """KL [b, s] between softmax(x xᵀ / √d) over the tokens up to each, summed over q, k and v."""
    total = torch.zeros(())
    for pair in zip(ours, theirs, strict=True):
        seen = torch.ones(pair[0].size(2), pair[0].size(2)).tril().bool()
        student, teacher = (
            torch.softmax(
                (x.double() @ x.double().mT / x.size(-1) ** 0.5).where(seen, -1e9), dim=-1
            )
            for x in pair
        )
        kl = torch.xlogy(teacher, teacher / student.clamp_min(1e-300)).sum(-1)  # [b, heads, s]
        total = total + kl.mean(1)
    return total


def train(
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    run: Run,
    changed: Run | None = None,
    changed_at: int = 0,
    intermediate: Intermediate | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place on whole global batches; loss and gradient norm of every step.

    From step `changed_at` on it is the run `changed`, at the same place of the data.
    """
    config = run.train
    parameters = [*model.parameters()]
    if intermediate is not None and intermediate.map is not None:
        parameters.append(intermediate.map)
    matrices = [p for p in parameters if p.dim() == 2]
    vectors = [p for p in parameters if p.dim() == 1]
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
        if not batch.loss_mask.any():
            records.append({"skipped": 1})
            continue
        if teacher is None:
            losses = language_modeling_loss(model, batch)
        else:
            losses = distillation_loss(model, teacher, batch)
        loss = masked_mean(losses, batch)
        extra = {}
        if intermediate is not None:
            loss, extra = intermediate.add(loss, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config)
        optimizer.step()
        records.append({"loss": loss.item(), "grad_norm": norm.item(), **extra})
    return records
