"""Let a model answer prompts, as training data for a student: sequence-level distillation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.sections.data import PromptConfig
from minitron.sections.generate import SamplingConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk."""

    path: Path
    """Its Hugging Face directory, with its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How prompts go through the model."""

    micro_batch_size: int = 16
    """Prompts that one rank takes through the model at a time, of which a pipeline has one for each
    stage under way; the responses are the same for all."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise MinitronError(
                f"generate.micro_batch_size={self.micro_batch_size} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Let a model answer prompts. `launch/train.py --data.path OUT/responses` then teaches a
    student the responses, with the prompts masked: sequence-level distillation.
    """

    model: ModelSource
    """The model that answers, usually the teacher."""
    prompts: PromptConfig
    """What to answer."""
    out: Path
    """Directory of the responses, as text (responses.jsonl) and as tokens."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Batches."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the responses are the same for all. Decoding one token at a time
    leaves no sequence to share: `sequence_parallel` has no effect, nor have virtual stages."""
    precision: Precision = "fp32"
    """Of weights and activations."""
    seed: int = 1234
    """Of the draws."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Continue where `out` ends; starts anew if there is nothing."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

import torch.distributed as dist

from minitron import artifact, config, platform
from minitron.data.responses import (
    RESPONSES,
    append_responses,
    count_answered,
    read_prompts,
    write_responses,
)
from minitron.data.tokenizer import Tokenizer, find_tokenizer
from minitron.metrics import log, progress
from minitron.model.generation import Prompt, generate
from minitron.model.llama import LlamaModel, build_llama, check_parallel, freeze
from minitron.model.sharding import open_model
from minitron.parallel import initialize, is_rank_zero, on_rank_zero
from minitron.train.lock import unlock
from minitron.train.run import fingerprints, has_more_to_do, open_run


def main(recipe: Recipe) -> None:
    """Build the model, answer what is not answered yet, write the token files."""
    parallel = recipe.parallel.without_interleaving()
    parallel = dataclasses.replace(parallel, sequence_parallel=False)
    topology = initialize(parallel, seed=recipe.seed)
    path, out = recipe.model.path, recipe.out
    on_rank_zero(
        lambda: artifact.check_out(
            out, overwrite=recipe.overwrite, resume=recipe.resume, inputs=[path]
        )
    )
    arch, weights = open_model(path)
    check_parallel(arch, parallel)
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise MinitronError(f"{path} holds no tokenizer; copy that of the model there")
    context = arch.max_position_embeddings
    prompts = on_rank_zero(lambda: read_prompts(recipe.prompts, tokenizer, context=context))
    inputs = fingerprints({"model": path})
    if not has_more_to_do(recipe, inputs):
        return
    dtype = platform.DTYPES[recipe.precision]
    model = freeze(build_llama(arch, topology, weights, dtype=dtype, transformer_impl="local"))
    open_run(recipe, inputs)
    file = out / f"{RESPONSES}.jsonl"
    first = on_rank_zero(lambda: count_answered(file, prompts))
    if first:
        log(f"{file} answers {first} of {len(prompts)} prompts; continuing")
    _answer(recipe, model, tokenizer, prompts, first, file)

    def finish() -> None:
        counts = write_responses(out, tokenizer)
        artifact.write_manifest(
            out,
            stage="generate",
            recipe=config.to_dict(recipe),
            parents={"model": path},
            metrics=counts,
        )
        unlock(out)
        print(
            f"wrote {out / RESPONSES}: {counts['documents']:,} responses, "
            f"{counts['tokens']:,} tokens",
            flush=True,
        )

    on_rank_zero(finish)


def _answer(
    recipe: Recipe,
    model: LlamaModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    first: int,
    file: Path,
) -> None:
    """Append the responses to the prompts from `first` on; rank 0 writes all ranks'."""
    topology = model.topology
    share = recipe.generate.micro_batch_size * topology.pp_size
    with progress(
        total=len(prompts), initial=first, desc="answer", unit="prompts", enabled=is_rank_zero()
    ) as bar:
        for start in range(first, len(prompts), share * topology.dp_size):
            mine = start + share * topology.dp_rank
            numbered = enumerate(prompts[mine : mine + share], mine)
            responses = generate(
                model,
                [Prompt(number, tokens) for number, tokens in numbered],
                recipe.sampling,
                eod=tokenizer.eod,
                seed=recipe.seed,
                micro_batch_size=recipe.generate.micro_batch_size,
            )
            gathered: list[list] = [[] for _ in range(topology.dp_size)]
            dist.all_gather_object(gathered, responses, group=topology.groups.dp)
            answered = [response for part in gathered for response in part]
            asked = prompts[start : start + len(answered)]
            records = [(p, r.tokens, r.finished) for p, r in zip(asked, answered, strict=True)]
            on_rank_zero(functools.partial(append_responses, file, records, tokenizer))
            bar.update(len(answered))


if __name__ == "__main__":
    run(main, recipe)
