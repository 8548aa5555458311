"""The distillation step of `tests.bench.distill` as scripts write it around transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minitron import platform
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.initial import InitialWeights
from tests.bench.step import Problem, open_batches


class Plain:
    """Two `LlamaForCausalLM`, `log_softmax` twice, `kl_div`, torch's fused AdamW."""

    gradient_bytes = 0  # they are let go after every step

    def __init__(self, problem: Problem) -> None:
        self.batches = open_batches(problem)
        self.first = 0
        self.teacher = self._build(problem.teacher, problem, seed=1).requires_grad_(False).eval()
        self.student = self._build(problem.student, problem, seed=0).train()
        norms = [p for p in self.student.parameters() if p.dim() == 1]
        matrices = [p for p in self.student.parameters() if p.dim() > 1]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": matrices}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def _build(self, arch: Architecture, problem: Problem, seed: int) -> LlamaForCausalLM:
        dtype = platform.DTYPES[problem.precision]
        with tempfile.TemporaryDirectory() as directory:
            hf.write_config(Path(directory), arch, dtype=dtype)
            config = LlamaConfig.from_pretrained(directory)
        weights = InitialWeights(arch, seed=seed)
        model = LlamaForCausalLM(config)
        model.load_state_dict({name: weights.read(name) for name in weights.infos})
        return model.to(dtype)

    def distillation(self) -> float:
        """A whole step."""
        (batch,) = self.batches.microbatches(self.first)
        self.first += len(batch.tokens)
        with torch.no_grad():
            theirs = self.teacher(batch.tokens, use_cache=False).logits.flatten(0, 1)
        ours = self.student(batch.tokens, use_cache=False).logits.flatten(0, 1)
        loss = F.kl_div(
            F.log_softmax(ours.float(), -1),
            F.log_softmax(theirs.float(), -1),
            reduction="batchmean",
            log_target=True,
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # as ours, to log it
        return norm.item()
