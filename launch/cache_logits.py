"""Write what a teacher says of every token of the data, for distillation without the teacher."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """The model whose outputs to store."""

    path: Path
    """Its Hugging Face directory."""
    allow_untrained: bool = False
    """Store even what a teacher says that predicts the data no better than chance."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Run a teacher over training and validation data once and store its distribution at every
    token, compressed. Any number of students can then be distilled from the store, in any order,
    batch size and topology, with `launch/distill.py --teacher.logits`.
    """

    teacher: TeacherSource
    """The model whose outputs to store."""
    data: DataConfig
    """The data of the distillation runs."""
    cache: CacheConfig
    """What to store of each token."""
    out: Path
    """Directory of the store."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the store is the same for all."""
    precision: Precision = "fp32"
    """Of weights and activations."""
    seed: int = 1234
    """Of the draws; with `cache.max_samples`, that of the runs whose first samples are stored."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Write what is missing in `out`; starts anew if there is nothing. A complete store is extended
    to more samples of the same data, with what it holds; until the end that takes its space twice.
    """


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import


from minitron import artifact, config, platform
from minitron.data.batches import prepare_data
from minitron.data.tokenizer import find_tokenizer
from minitron.distill.gates import check_teacher, check_weights
from minitron.distill.offline.cache import (
    check_vocabulary,
    close_store,
    describe,
    open_store,
    write_missing_shards,
)
from minitron.distill.offline.earlier import discard_earlier, open_earlier, take_over
from minitron.distill.offline.samples import choose_samples, first_batch
from minitron.model.llama import build_llama, freeze
from minitron.model.sharding import open_model
from minitron.parallel import initialize, on_rank_zero


def main(recipe: Recipe) -> None:
    """Build the teacher, run it over the samples that are missing, write the manifest."""
    topology = initialize(recipe.parallel, seed=recipe.seed)
    teacher, out = recipe.teacher.path, recipe.out
    on_rank_zero(
        lambda: artifact.check_out(
            out, overwrite=recipe.overwrite, resume=recipe.resume, inputs=[teacher]
        )
    )
    arch, weights = open_model(teacher)
    check_vocabulary(recipe.cache, arch.vocab_size)
    recipe.parallel.check_seq_length(recipe.data.seq_length)
    arch.check_seq_length(recipe.data.seq_length)
    tokenizer = find_tokenizer(teacher)
    data = on_rank_zero(lambda: prepare_data(recipe.data, tokenizer, vocab_size=arch.vocab_size))
    samples = choose_samples(data, max_samples=recipe.cache.max_samples, seed=recipe.seed)
    info = on_rank_zero(
        lambda: describe(
            samples,
            recipe.cache,
            teacher=teacher,
            tokenizer=tokenizer,
            vocab_size=arch.vocab_size,
            precision=recipe.precision,
            seed=recipe.seed,
        )
    )
    dtype = platform.DTYPES[recipe.precision]
    model = freeze(build_llama(arch, topology, weights, dtype=dtype))
    check_weights(model, teacher)
    size = recipe.cache.micro_batch_size
    untrained = recipe.teacher.allow_untrained
    check_teacher(model, first_batch(samples, size), allow_untrained=untrained)

    def begin() -> None:
        if out.exists() and recipe.overwrite and not recipe.resume:
            shutil.rmtree(out.resolve())
            discard_earlier(out)
        if recipe.resume:
            take_over(out, info, samples)
        artifact.create_directory(out.resolve())
        config.save(recipe, out / artifact.RECIPE)
        open_store(out, info, samples)

    def finish() -> None:
        metrics = close_store(out, info)
        artifact.write_manifest(
            out,
            stage="cache_logits",
            recipe=config.to_dict(recipe),
            parents={"teacher": teacher},
            metrics=metrics,
        )
        discard_earlier(out)
        print(
            f"wrote {out}: {metrics['samples']:,} samples, {metrics['tokens']:,} tokens, "
            f"{metrics['bytes']:,} bytes, {metrics['bytes_per_token']:.1f} a token",
            flush=True,
        )

    on_rank_zero(begin)
    write_missing_shards(
        model, samples, info, out, micro_batch_size=size, earlier=open_earlier(out)
    )
    on_rank_zero(finish)


if __name__ == "__main__":
    run(main, recipe)
