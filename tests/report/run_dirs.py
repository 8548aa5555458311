"""Run directories as stages leave them, without running a stage."""

import json

import numpy as np
import yaml
from safetensors.numpy import save_file

VALID_DATA = {"path": ["train.bin"], "valid_path": ["valid.bin"], "seq_length": 64}


def write_manifest(directory, stage, *, recipe=None, parents=None, **metrics):
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {
        "stage": stage,
        "created": "2026-01-02T03:04:05Z",
        "recipe": recipe or {},
        "parents": parents or {},
        "command": ["launch/script.py", "--out", str(directory)],
        "ranks": 2,
        "versions": {"torch": "2.13.0"},
        "metrics": metrics,
        "files": {},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def training_run(directory, losses, *, stage="train", finished=True, data=None, **extra):
    """A run with one validation a step: losses[0] before the first update, 10 tokens a step."""
    directory.mkdir(parents=True)
    records = [{"step": 0, "tokens": 0, "val_loss": losses[0]}]
    for step, loss in enumerate(losses[1:], start=1):
        common = {"step": step, "tokens": 10 * step}
        records.append({**common, "loss": loss, "tokens_per_second": 5.0, **extra})
        records.append({**common, "val_loss": loss})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text)
    recipe = {"data": data or VALID_DATA, "train": {"steps": len(losses) - 1}}
    if stage == "distill":
        recipe["teacher"] = {"path": "teacher"}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if finished:
        write_manifest(directory, stage, recipe=recipe, num_parameters=4_512_746_496)
    return directory


def score_directory(directory, *, layers=3, hidden=8, ffn=12, heads=4):
    write_manifest(directory, "importance")
    rng = np.random.default_rng(0)
    shapes = {"hidden": (layers, hidden), "ffn": (layers, ffn), "heads": (layers, heads)}
    tensors = {
        name: rng.random((3, 3, *shape), dtype=np.float32) + 0.1 for name, shape in shapes.items()
    }
    tensors["block_influence"] = np.linspace(0.5, 0.1, layers, dtype=np.float32)
    save_file(tensors, directory / "scores.safetensors")
    return directory


def evaluation(directory, lm_loss, **data):
    write_manifest(directory, "eval", recipe={"data": data})
    values = {"lm_loss": lm_loss, "perplexity": float(np.exp(lm_loss)), "tokens": 640}
    (directory / "eval.json").write_text(json.dumps(values))
    return directory
