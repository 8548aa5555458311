"""Writing a store on the ranks of the pool."""

from pathlib import Path

from minitron import artifact
from minitron.distill.offline.cache import (
    close_store,
    describe,
    open_store,
    write_missing_shards,
)
from minitron.distill.offline.earlier import discard_earlier, open_earlier, take_over
from minitron.distill.offline.files import StoreInfo
from minitron.distill.offline.samples import SampleSet, choose_samples
from minitron.model.hf import read_architecture
from minitron.model.llama import freeze
from minitron.parallel import initialize, on_rank_zero
from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig
from minitron.sections.parallel import ParallelConfig
from tests.runs import build_model


def describe_store(
    teacher: Path, data: DataConfig, cache: CacheConfig, seed: int
) -> tuple[SampleSet, StoreInfo]:
    """What a store holds and says."""
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
    return samples, info


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
    samples, info = describe_store(teacher, data, cache, seed)
    if resume:
        on_rank_zero(lambda: take_over(out, info, samples))
    on_rank_zero(lambda: open_store(out, info, samples))
    model = freeze(build_model(teacher, topology))
    size = cache.micro_batch_size
    write_missing_shards(
        model, samples, info, out, micro_batch_size=size, earlier=open_earlier(out)
    )
    on_rank_zero(lambda: close_store(out, info))
    on_rank_zero(lambda: artifact.write_manifest(out, stage="cache_logits", recipe={}, parents={}))
    on_rank_zero(lambda: discard_earlier(out))
