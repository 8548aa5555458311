"""What a step's ranks exchange, read off a profile."""

import contextlib

import pytest
import torch

from minitron.parallel import initialize
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from minitron.train.objective import LanguageModeling
from tests.runs import (
    SEQ_LENGTH,
    VOCAB,
    Run,
    build_chunks_of,
    open_batches,
    run_on,
    write_tokens,
)
from tests.tiny import save_llama


def _exchanged(parallel, run):
    """Collectives of the second step with their numbers of elements, and this rank's parameters."""
    topology = initialize(parallel)
    model = build_chunks_of(run.model, topology)
    batches = open_batches(run, rank=topology.dp_rank, size=topology.dp_size)
    trainer = Trainer(model, LanguageModeling(), batches, None, run.train, run.out)
    with contextlib.closing(trainer):
        trainer.train_step()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            trainer.train_step()
    found = [
        (event.name.removeprefix("gloo:"), torch.Size(event.input_shapes[0]).numel())
        for event in profile.events()
        if event.name.startswith("gloo:")
    ]
    return found, sum(parameter.numel() for chunk in model for parameter in chunk.parameters())


@pytest.mark.parametrize("topology", ["tp1", "dp2"])
def test_only_replicas_exchange_gradients_and_parameters(tmp_path, topology):
    """Once each, all in one bucket; what else there is are loss, tokens and the gradient norm."""
    save_llama(tmp_path / "model", vocab_size=VOCAB)
    tokens = write_tokens(tmp_path / "tokens", 9 * SEQ_LENGTH + 1)
    config = TrainConfig(steps=3, global_batch_size=4)
    run = Run(model=tmp_path / "model", tokens=tokens, out=tmp_path, train=config)
    for found, parameters in run_on(topology, _exchanged, run):
        large = [(name, size) for name, size in found if size > 3]
        assert len(found) - len(large) <= 4
        if topology == "tp1":
            assert large == []
            continue
        (reduced, gradients), (gathered, share) = large
        assert (reduced, gathered) == ("all_reduce", "all_gather")
        assert parameters <= gradients == 2 * share < 1.01 * parameters + 256
