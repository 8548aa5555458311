"""Writing a store on the ranks of the pool."""

from pathlib import Path

from minitron import artifact
from minitron.distill.offline.cache import (
    check_continues,
    close_store,
    describe,
    open_store,
    write_missing_shards,
)
from minitron.distill.offline.samples import choose_samples
from minitron.model.hf import read_architecture
from minitron.model.llama import freeze
from minitron.parallel import initialize, on_rank_zero
from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig
from minitron.sections.parallel import ParallelConfig
from tests.runs import build_model


def write_store(
    parallel: ParallelConfig,
    teacher: Path,
    data: DataConfig,
    cache: CacheConfig,
    out: Path,
    seed: int,
    resume: bool = False,
) -> None:
    """Do on this rank what launch/cache_logits.py does."""
    topology = initialize(parallel)
    samples = choose_samples(data, max_samples=cache.max_samples, seed=seed)
    info = describe(
        samples,
        cache,
        teacher=teacher,
        tokenizer=None,
        vocab_size=read_architecture(teacher).vocab_size,
        precision="fp32",
        seed=seed,
    )
    if resume:
        on_rank_zero(lambda: check_continues(out, info))
    on_rank_zero(lambda: open_store(out, info, samples))
    model = freeze(build_model(teacher, topology))
    write_missing_shards(model, samples, info, out, micro_batch_size=cache.micro_batch_size)
    on_rank_zero(lambda: close_store(out, info))
    on_rank_zero(lambda: artifact.write_manifest(out, stage="cache_logits", recipe={}, parents={}))
