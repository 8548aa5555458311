"""From a Hugging Face directory to our model, on any ranks, and back."""

import torch

from minitron.data.batches import Batch
from minitron.model.schedule import run_schedule
from minitron.model.sharding import save_model
from minitron.parallel import initialize
from tests.runs import build_model, load_tensors


def batch_of(vocab_size):
    tokens = torch.randint(vocab_size, (2, 25), generator=torch.Generator().manual_seed(1))
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=torch.ones(2, 24),
        position_ids=torch.arange(24).repeat(2, 1),
        valid=torch.ones(2, dtype=torch.bool),
        sample_ids=torch.full((2, 2), -1),
    )


def logits_and_copies(parallel, directories, out):
    """Logits [b, s, valid columns] of every model on the last stage; all are saved again."""
    topology = initialize(parallel)
    found = {}
    for directory in directories:
        model = build_model(directory, topology)

        def keep(hidden, batch, index, model=model, name=directory.name):
            found[name] = model.logits(hidden)[..., : model.valid_columns].transpose(0, 1)

        batch = batch_of(model.arch.vocab_size)
        run_schedule(model, [batch], keep, forward_only=True)
        copy = out / directory.name
        copy.mkdir(exist_ok=True)
        save_model([model], copy, dtype=torch.float32, base_dir=directory)
    return found


def assert_same_tensors(directory, copy):
    before, after = load_tensors(directory), load_tensors(copy)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def check_round_trip(directory, model, ranks, copies):
    """Compare what all ranks found of a model, and the copy, with transformers' `model`."""
    name = directory.name
    ours = torch.cat([rank[name] for rank in ranks if rank], -1)  # in order of the vocabulary
    with torch.no_grad():
        expected = model(batch_of(model.config.vocab_size).tokens).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4, msg=lambda m: f"{name}: {m}")
    assert_same_tensors(directory, copies / name)
