"""Train a Llama on the next token: from scratch, or from a model (teacher correction)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.sections.data import DataConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.train import TrainConfig
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class ModelInit:
    """The shape of a new model."""

    hidden_size: int
    """Embedding channels."""
    ffn_hidden_size: int
    """Neurons of the gated MLP."""
    num_layers: int
    """Transformer layers."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads; null gives every query head its own."""
    kv_channels: int | None = None
    """Dimension of a head; null means hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """Rows of the embedding table; null takes the tokenizer's."""
    max_position_embeddings: int | None = None
    """Context length; null means data.seq_length."""
    share_embeddings_and_output_weights: bool = False
    """Use the embedding table as the output head too."""
    rotary_base: float = 10000.0
    """Base period of RoPE."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the RMS norms."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""

    def architecture(self, vocab_size: int, seq_length: int) -> Architecture:
        """The shape, with what was left open taken from the tokenizer and the data."""
        return Architecture(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups or self.num_attention_heads,
            kv_channels=self.kv_channels or self.hidden_size // max(self.num_attention_heads, 1),
            vocab_size=self.vocab_size or vocab_size,
            max_position_embeddings=self.max_position_embeddings or seq_length,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            rotary_base=self.rotary_base,
            layernorm_epsilon=self.layernorm_epsilon,
        )


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to train: one on disk, or a new one."""

    path: Path | None = None
    """Hugging Face directory to start from."""
    init: ModelInit | None = None
    """Shape of a new model with random weights."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.init is None):
            given = "both were given" if self.path is not None else "neither was given"
            raise MinitronError(f"give either --model.path or --model.init.*; {given}")


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The tokenizer of the data."""

    path: Path | None = None
    """A directory that holds one, a tokenizer.json or a sentencepiece .model; null takes the
    model's."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Train a Llama to predict the next token. From scratch it is pre-training; from a model, on
    the data of a later distillation, it is teacher correction.
    """

    model: ModelSource
    """The model to start from."""
    tokenizer: TokenizerSource = field(default_factory=TokenizerSource)
    """The tokenizer of the data."""
    data: DataConfig
    """Training and validation data."""
    out: Path
    """Directory of the run: metrics, checkpoints, and in the end the model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batches, optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the result is the same for all."""
    precision: Precision = "fp32"
    """Of weights and activations; the optimizer keeps fp32 main weights."""
    seed: int = 1234
    """Of the initial weights and of the order of the samples."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; starts anew if there is none. SIGTERM
    and SIGUSR1 leave one behind."""
    allow_change: bool = False
    """Let `resume` go on with another data.seq_length, train.global_batch_size, train.steps or
    learning rate than the run had, or with other content of the model's or the data's path; ranks
    may always be others."""
    until_step: int | None = None
    """Stop after this step with the model so far in `out`, for `resume` to go on; the learning rate
    is still that of a run to train.steps. null goes to the last step."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron import artifact, platform
from minitron.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.initial import InitialWeights
from minitron.model.llama import build_chunks, check_parallel
from minitron.model.sharding import open_model
from minitron.model.weights import WeightSource
from minitron.parallel import initialize, on_rank_zero
from minitron.train.checkpoint import ModelFiles
from minitron.train.loop import Trainer
from minitron.train.objective import LanguageModeling
from minitron.train.run import fingerprints, finish_run, has_more_to_do, open_batches, open_run


def main(recipe: Recipe) -> None:
    """Build the model, train it, write it."""
    topology = initialize(recipe.parallel, seed=recipe.seed)
    on_rank_zero(
        lambda: artifact.check_out(
            recipe.out,
            overwrite=recipe.overwrite,
            resume=recipe.resume,
            inputs=[recipe.model.path, recipe.tokenizer.path],
        )
    )
    tokenizer = _tokenizer(recipe)
    arch, weights = _model(recipe, tokenizer)
    check_parallel(arch, recipe.parallel)
    arch.check_seq_length(recipe.data.seq_length)
    batches, validation = open_batches(
        recipe.data,
        recipe.train,
        topology,
        tokenizer=tokenizer,
        vocab_size=arch.vocab_size,
        seed=recipe.seed,
    )
    inputs = fingerprints({"model": recipe.model.path}, batches, validation)
    if not has_more_to_do(recipe, inputs):
        return
    dtype = platform.DTYPES[recipe.precision]
    model = build_chunks(arch, topology, weights, dtype=dtype, recompute=recipe.train.recompute)
    files = ModelFiles(dtype=dtype, base_dir=recipe.model.path, tokenizer=tokenizer)
    trainer = Trainer(
        model, LanguageModeling(), batches, validation, recipe.train, recipe.out, files
    )
    if recipe.resume:
        trainer.resume()
    open_run(recipe, inputs)  # a change that is refused has changed nothing
    metrics = trainer.run(recipe.until_step)
    parents = {} if recipe.model.path is None else {"model": recipe.model.path}
    finish_run(recipe, model, stage="train", parents=parents, metrics=metrics, files=files)


def _tokenizer(recipe: Recipe) -> Tokenizer | None:
    if recipe.tokenizer.path is not None:
        return load_tokenizer(recipe.tokenizer.path)
    return find_tokenizer(recipe.model.path) if recipe.model.path is not None else None


def _model(recipe: Recipe, tokenizer: Tokenizer | None) -> tuple[Architecture, WeightSource]:
    """The shape and where the weights come from."""
    init = recipe.model.init
    if init is None:
        assert recipe.model.path is not None
        return open_model(recipe.model.path)
    if tokenizer is None and init.vocab_size is None:
        raise MinitronError(
            "the vocabulary of the new model is unknown; give --tokenizer or "
            "--model.init.vocab_size"
        )
    arch = init.architecture(tokenizer.vocab_size if tokenizer else 0, recipe.data.seq_length)
    hf.check_shape(arch)
    weights = InitialWeights(arch, seed=recipe.seed, init_method_std=init.init_method_std)
    return arch, weights


if __name__ == "__main__":
    run(main, recipe)
