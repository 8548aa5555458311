"""A training run's directory: opened by the first attempt, resumed by later ones, finished once.

    recipe.yaml  inputs.json  metrics.jsonl  tensorboard/  checkpoints/     while it runs
    config.json  *.safetensors  tokenizer  manifest.json                    when it is complete

`inputs.json` has the fingerprints of what the run reads: a path may hold something else by the time
it is resumed.

The weights are written aside and moved in, the manifest last: a directory with a manifest holds a
whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minitron import artifact, config, parallel
from minitron.data.batches import EvalBatches, TrainBatches, open_train, open_windows, prepare_data
from minitron.data.sampling import TokenWindows
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.metrics import log
from minitron.model.llama import LlamaModel
from minitron.model.sharding import save_model
from minitron.parallel import Topology
from minitron.sections.data import DataConfig
from minitron.sections.train import TrainConfig
from minitron.train.checkpoint import ModelFiles
from minitron.train.lock import lock, unlock

# What says only how this attempt is made.
_ATTEMPT_KEYS = ("out", "resume", "overwrite", "until_step", "allow_change")
# What may differ between the attempts of one run: where it runs and what it writes; and the
# teacher, who may have learnt something meanwhile (launch/correct_and_distill.sh).
_FREE_KEYS = (
    "parallel",
    "teacher.window",
    "teacher.offload_states",
    "teacher.placement",
    "teacher.layers_per_stage",
    "data.workers",
    "train.micro_batch_size",
    "train.recompute",
    "train.valid_interval",
    "train.checkpoint_interval",
    "train.keep_checkpoints",
    "generate.micro_batch_size",
    "fingerprint of teacher",
)
# What may differ if asked for. Where samples or batches of another size begin follows from the
# tokens seen so far; the learning rate is a function of the step; weights come from the checkpoint.
_CHANGEABLE_KEYS = (
    "data.seq_length",
    "train.global_batch_size",
    "train.steps",
    "train.lr",
    "train.min_lr",
    "train.warmup_steps",
    "fingerprint of model",
    "fingerprint of student",
    "fingerprint of data.path",
    "fingerprint of data.valid_path",
)


def open_run(recipe: Any, inputs: Mapping[str, str]) -> bool:
    """Create the run's directory and save recipe and inputs in it; call on all ranks.

    With `recipe.resume` an earlier attempt's directory is taken over if recipe and inputs agree;
    with `recipe.allow_change`, where the stage knows that, batches, samples, the learning rate's
    schedule and what is read may be others.

    Args:
        recipe: of the stage.
        inputs: fingerprints of what the run reads, by role; see `fingerprints`.

    Returns:
        Whether there is something to do: False if a run that is complete is resumed, which leaves
        the directory as it is.

    Raises:
        MinitronError: the directory is not empty and neither resume nor overwrite is asked for,
            another process writes it, or the earlier attempt had another recipe or other inputs.
    """
    out: Path = recipe.out

    def prepare() -> bool:
        artifact.check_out(out, overwrite=recipe.overwrite, resume=recipe.resume)
        artifact.create_directory(out.resolve())
        lock(out)
        if recipe.overwrite and not recipe.resume:
            _empty(out)
        saved = out / artifact.RECIPE
        if recipe.resume and saved.exists():
            changes = _changes(recipe, inputs)
            if changes is None:
                unlock(out)
                return False
            for change in changes:
                log(f"goes on with a change: {change}")
        (out / artifact.MANIFEST).unlink(missing_ok=True)
        config.save(recipe, saved)
        artifact.write_json(out / artifact.INPUTS, dict(inputs))
        return True

    return parallel.on_rank_zero(prepare)


def has_more_to_do(recipe: Any, inputs: Mapping[str, str]) -> bool:
    """What `open_run` will return or raise of a run to be resumed; call on all ranks.

    Asked before models are loaded, it saves their time.

    Args:
        recipe: of the stage.
        inputs: as for `open_run`.

    Raises:
        MinitronError: another process writes it, or the earlier attempt had another recipe or other
            inputs.
    """

    def look() -> bool:
        if not recipe.resume or not (recipe.out / artifact.RECIPE).exists():
            return True
        lock(recipe.out)  # from here on, so that no other process goes on meanwhile
        goes_on = False
        try:
            goes_on = _changes(recipe, inputs) is not None
        finally:
            if not goes_on:
                unlock(recipe.out)
        return goes_on

    return parallel.on_rank_zero(look)


def fingerprints(
    models: Mapping[str, Path | None],
    batches: TrainBatches | None = None,
    validation: EvalBatches | None = None,
) -> dict[str, str]:
    """What identifies a run's inputs; call on all ranks.

    Args:
        models: directories by role; None stands for none.
        batches: training data.
        validation: held-out data.
    """
    streams = {
        "data.path": batches.source.datasets if batches else (),
        "data.valid_path": validation.windows if validation else (),
    }

    def find() -> dict[str, str]:
        found = {role: artifact.fingerprint(path) for role, path in models.items() if path}
        return found | {role: content(read) for role, read in streams.items() if read}

    return parallel.on_rank_zero(find)


def content(data: Sequence[TokenWindows]) -> str:
    """What identifies token data, as a run's `inputs.json` has it."""
    return " ".join(f"{windows.stream.fingerprint:016x}" for windows in data)


def finish_run(
    recipe: Any,
    model: Sequence[LlamaModel],
    *,
    stage: str,
    parents: Mapping[str, Path],
    metrics: Mapping[str, Any],
    files: ModelFiles,
) -> None:
    """Write the trained model into the run's directory, then its manifest; call on all ranks."""
    out: Path = recipe.out
    aside = out / ".model.partial"

    def create() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()

    def publish() -> None:
        files.write(aside, model[0].arch)
        for file in sorted(aside.iterdir()):
            file.replace(out / file.name)
        aside.rmdir()
        artifact.write_manifest(
            out,
            stage=stage,
            recipe=config.to_dict(recipe),
            parents=parents,
            metrics={"num_parameters": model[0].arch.num_parameters, **metrics},
        )
        unlock(out)
        print(f"wrote {out}", flush=True)

    parallel.on_rank_zero(create)
    save_model(model, aside, dtype=files.dtype)
    parallel.on_rank_zero(publish)


def open_batches(
    data: DataConfig,
    train: TrainConfig,
    topology: Topology,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seed: int,
) -> tuple[TrainBatches, EvalBatches | None]:
    """This rank's training batches, and validation batches if there is data; call on all ranks.

    Raises:
        MinitronError: the data is missing, damaged, or of another tokenizer, or a size does not
            divide.
    """
    topology.config.check_seq_length(data.seq_length)
    data = parallel.on_rank_zero(lambda: prepare_data(data, tokenizer, vocab_size=vocab_size))
    ranks = {"data_parallel_rank": topology.dp_rank, "data_parallel_size": topology.dp_size}
    batches = TrainBatches(
        open_train(data),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=seed,
        **ranks,
    )
    topology.config.check_num_microbatches(batches.num_microbatches)
    if not data.valid_path:
        return batches, None
    validation = EvalBatches(
        open_windows(data.valid_path, data.seq_length),
        micro_batch_size=train.micro_batch_size,
        include_remainder=False,
        max_samples=data.valid_samples,
        **ranks,
    )
    return batches, validation


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != artifact.LOCK:
            path.unlink()


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    if not isinstance(recipe, dict):
        raise MinitronError(f"{path} is not a recipe; restore it, or choose another --out")
    return recipe


def _changes(recipe: Any, inputs: Mapping[str, str]) -> list[str] | None:
    """What is to differ from the attempt that is resumed; None, and a line, if it is complete.

    It is to go on if another end or a change is asked for.

    Raises:
        MinitronError: it is to go on with another recipe or other inputs than before, and more
            than what may change.
    """
    saved, out = recipe.out / artifact.RECIPE, recipe.out
    old, new = _flatten(_read_recipe(saved)), _flatten(config.to_dict(recipe))
    if (out / artifact.INPUTS).exists():  # older runs have none
        old |= {
            f"fingerprint of {role}": x
            for role, x in artifact.read_json(out / artifact.INPUTS).items()
        }
        new |= {f"fingerprint of {role}": x for role, x in inputs.items()}
    differences = _differences(old, new)
    changed = {key for key in differences if not _is_below(key, _FREE_KEYS)}
    changeable = hasattr(recipe, "allow_change") and changed <= set(_CHANGEABLE_KEYS)
    if changed and not (changeable and recipe.allow_change):
        remedy = "take the old values or another --out"
        if changeable:
            remedy = f"add --allow_change, or {remedy}"
        only_inputs = all(key.startswith("fingerprint") for key in changed)
        before = (
            f"other inputs than {out / artifact.INPUTS}"
            if only_inputs
            else f"another recipe than {saved}"
        )
        raise MinitronError(
            f"--resume would continue a run with {before}: "
            f"{'; '.join(differences[key] for key in sorted(changed))}; {remedy}"
        )
    ends = old.get("until_step"), new.get("until_step")
    if (out / artifact.MANIFEST).exists() and not changed and ends[0] == ends[1]:
        log(f"{out} is complete; --resume has nothing to do")
        return None
    return list(differences.values())


def recipe_changes(
    made: Mapping[str, Any], recipe: Any, *, apart_from: Sequence[str] = ()
) -> list[str]:
    """What a recipe says otherwise than the one that something was made with, a text for each key.

    Args:
        made: that recipe, as plain values.
        recipe: of the same stage.
        apart_from: keys and sections that may differ, beside what makes no other result.
    """
    differences = _differences(_flatten(made), _flatten(config.to_dict(recipe)))
    free = (*_FREE_KEYS, *apart_from)
    return [text for key, text in differences.items() if not _is_below(key, free)]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What the flat recipe of an attempt has otherwise than another's, by key."""
    return {
        key: f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _ATTEMPT_KEYS
    }


def _is_below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
