"""Commands that go wrong, by what is wrong: a stage, its arguments, and what is said of it.

They run where `test_errors.world` is, a directory with models, data and runs, sound and damaged.
"""

VOCAB = 61

DATA = ("--data", "tokens", "--data.seq_length", 16)
TRAIN = ("--model", "model", *DATA)
EVAL = ("--model", "model", *DATA)
DISTILL = ("--teacher", "model", "--student", "other", *DATA)
PRUNE = ("--model", "model", "--scores", "scores")
INIT = tuple(
    part
    for key, value in {
        "hidden_size": 48,
        "ffn_hidden_size": 48,
        "num_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": VOCAB,
    }.items()
    for part in (f"--model.init.{key}", value)
)

OF_SETTINGS = {
    # The command line and the recipe
    "typo in a key": ("train", (*TRAIN, "--train.stepz", 1), "stepz; did you mean train.steps?"),
    "typo in a recipe": (
        "train",
        (*TRAIN, "--config", "typo.yaml"),
        "typo.yaml: unknown key train.stepz; did you mean train.steps?",
    ),
    "tab in a recipe": (
        "train",
        ("--config", "tab.yaml"),
        "tab.yaml: line 2: not valid YAML, a tab; indent with spaces",
    ),
    "broken recipe": ("train", ("--config", "broken.yaml"), "broken.yaml: line 1: not valid YAML"),
    "missing recipe": ("eval", ("--config", "no.yaml"), r"no.yaml: cannot be read \(No such file"),
    "wrong type": (
        "train",
        (*TRAIN, "--train.steps", "many"),
        "train.steps=many is not valid; expected an integer",
    ),
    "fraction of a step": ("train", (*TRAIN, "--train.steps", 1.5), "train.steps=1.5 is not valid"),
    "no such precision": ("eval", (*EVAL, "--precision", "fp8"), "expected one of fp32, bf16"),
    "missing key": ("distill", ("--teacher", "model", *DATA), "--student.path is missing; give it"),
    "key without a value": ("eval", (*EVAL, "--precision"), "--precision has no value; give"),
    "stray argument": ("eval", (*EVAL, "fp32"), "unexpected argument fp32; give keys as --key"),
    "negative steps": ("train", (*TRAIN, "--train.steps=-1"), "train.steps=-1 must not be neg"),
    "negative rate": ("distill", (*DISTILL, "--train.lr=-0.1"), "train.lr=-0.1 must not be neg"),
    "rate that is no number": ("train", (*TRAIN, "--train.lr", "nan"), "train.lr=nan is not valid"),
    "no samples": (
        "importance",
        (*EVAL, "--importance.samples", 0),
        "importance.samples=0 must be at least 1",
    ),
    "no model": ("train", DATA, "give either --model.path or --model.init.*; neither was given"),
    "two models": ("train", (*TRAIN, *INIT), "--model.init.*; both were given"),
    "nothing to prune": ("prune", PRUNE, "nothing to prune; give at least one of prune.hidden_si"),
    # Ranks
    "ranks do not divide": (
        "eval",
        (*EVAL, "--parallel.tensor_model_parallel_size", 2),
        "the number of ranks, 1, does not divide into groups of "
        "parallel.tensor_model_parallel_size=2 x parallel.pipeline_model_parallel_size=1 = 2; "
        "start a multiple of 2 ranks",
    ),
    "layers do not add up": (
        "train",
        (*TRAIN, "--parallel.layers_per_stage", "[3]"),
        r"layers_per_stage=\[3\] adds up to 3 layers, the model has 4",
    ),
    "batch does not divide": (
        "train",
        (*TRAIN, "--train.global_batch_size", 5, "--train.micro_batch_size", 2),
        "train.global_batch_size=5 is not a multiple of train.micro_batch_size x data-parallel "
        "ranks = 2 x 1 = 2; use 4 or 6",
    ),
    **{
        f"{stage}: samples do not split": (
            stage,
            (
                *arguments,
                *("--data.seq_length", 15, "--parallel.sequence_parallel"),
                *("--parallel.tensor_model_parallel_size", 2),
            ),
            "data.seq_length=15 is not divisible by parallel.tensor_model_parallel_size=2",
        )
        for stage, arguments in {"eval": EVAL, "importance": EVAL}.items()
    },
    # Tasks
    "nothing to measure": (
        "eval",
        ("--model", "model"),
        "there is nothing to measure; give --data.path or --tasks.names",
    ),
    "tasks without trials": (
        "importance",
        (*EVAL, "--tasks.names", "winogrande"),
        r"tasks.names=.* (measures trials, but there are none; add --depth.l|needs the lm-)",
    ),
    "accuracy without tasks": (
        "importance",
        (*EVAL, "--depth.greedy", 1, "--depth.criterion", "accuracy"),
        "depth.criterion=accuracy needs tasks; give --tasks.names",
    ),
    # Models
    **{
        f"{stage}: samples longer than the context": (
            stage,
            (*arguments, *DATA),
            "data.seq_length=16 is longer than the model's context; use at most "
            "max_position_embeddings=15, or raise that in its config.json",
        )
        for stage, arguments in {
            "eval": ("--model", "short"),
            "importance": ("--model", "short"),
            "train": ("--model", "short"),
            "distill": ("--teacher", "short", "--student", "model"),
            "prune": ("--model", "short", "--prune.drop_layers", 1),
        }.items()
    },
    "no model directory": ("eval", ("--model", "no", *DATA), "--model.path no does not exist in "),
    "no config": ("eval", ("--model", "full", *DATA), "full has no config.json; give a Hugging"),
    "no weights": ("eval", ("--model", "weightless", *DATA), "has neither model.safetensors nor"),
    "truncated weights": (
        "eval",
        ("--model", "truncated", *DATA),
        "truncated/model.safetensors is not a readable safetensors file .*; copy or create it",
    ),
    **{
        f"{stage}: flipped bit": (
            stage,
            arguments,
            "flipped/model.safetensors does not match its SHA-256 in manifest.json; the file is",
        )
        for stage, arguments in {
            "eval": ("--model", "flipped", *DATA),
            "train": ("--model", "flipped", *DATA),
            "distill": ("--teacher", "flipped", "--student", "model", *DATA),
            "prune": ("--model", "flipped", "--prune.drop_layers", 1),
            "convert": ("--model", "flipped"),
        }.items()
    },
    "other vocabulary": (
        "distill",
        ("--teacher", "model", "--student", "wide", *DATA),
        "the teacher's vocabulary has 61 tokens, the student's 99, .* give a student pruned from",
    ),
    "no teacher": ("distill", DISTILL[2:], "give either .* --teacher.logits; neither was given"),
    "a store in windows": (
        "distill",
        (*DISTILL[2:], "--teacher.logits", "no", "--teacher.window", 2),
        "teacher.window is of a teacher at hand, not of the store no; leave it out, or give",
    ),
    "more tokens than there are": (
        "distill",
        (*DISTILL, "--distill.loss", "top_k", "--distill.top_k", 5000),
        r"distill.top_k=5000 is more than the vocabulary of 61; lower it, or set distill.loss=forw",
    ),
    "two teachers": ("distill", (*DISTILL, "--teacher.logits", "no"), ".*logits; both were given"),
    "layer that no student has": (
        "distill",
        (
            *("--teacher", "model", "--student", "other", *DATA),
            *("--distill.intermediate.states", "mlp_input"),
            *("--distill.intermediate.layers", "[[4, 0]]"),
        ),
        r"distill.intermediate.layers=\[\[4, 0\]\] names layer 4 of the student, which has 4; use",
    ),
    "nothing to store": (
        "cache_logits",
        ("--teacher", "model", *DATA),
        "give either --cache.top_k or --cache.draws; neither was given",
    ),
    "more to store than there is": (
        "cache_logits",
        ("--teacher", "model", *DATA, "--cache.top_k", 62),
        "cache.top_k=62 is more than the teacher's vocabulary of 61; lower it",
    ),
    "resumed without a store": (
        "cache_logits",
        ("--teacher", "model", *DATA, "--cache.draws", 5, "--out", "other", "--resume"),
        r"--resume cannot continue other, which is no run \(it has no recipe.yaml\); correct --out",
    ),
    "other tokenizer": (
        "distill",
        ("--teacher", "speaks_a", "--student", "speaks_b", "--data", "tokens_a"),
        r"the tokenizers differ: speaks_a/tokenizer.model \(\w{16}\) and speaks_b/tokenizer.model",
    ),
    "scores of another model": (
        "prune",
        ("--model", "other", "--scores", "scores", "--prune.num_layers", 2),
        r"scores belong to another model: scores was measured on .*/model \(\w{16}\), not on other",
    ),
    "tasks without a tokenizer": (
        "importance",
        ("--model", "model", *DATA, "--depth.layers", "--tasks.names", "x"),
        r"tasks.names=\['x'\] are text, but the model's directory has no tokenizer; put its",
    ),
    "no scores": (
        "prune",
        ("--model", "model", "--prune.num_layers", 2),
        "needs importance scores; give --scores.path .* or --data.path",
    ),
    "a check without data": (
        "prune",
        ("--model", "model", "--prune.drop_layers", 2, "--check.samples", 4),
        "check.samples=4 with check.micro_batch_size=1 needs data, .* give --data.path",
    ),
    "trials that were not made": (
        "prune",
        (*PRUNE, "--prune.num_layers", 2, "--prune.layer_ranking", "greedy"),
        "scores/depth.json does not exist; run launch/importance.py with --depth.layers",
    ),
    "trials of too many layers": (
        "importance",
        (*EVAL, "--depth.greedy", 4),
        "depth.greedy=4 leaves none of the model's 4 layers; choose at most 3",
    ),
    "more query heads than groups hold": (
        "prune",
        (*PRUNE, "--prune.num_query_groups", 1, "--prune.num_attention_heads", 8),
        "are 8 query heads each, but a key/value head of the model has 4; choose at most 1 x 4 = 4",
    ),
    "layer that is not there": (
        "prune",
        ("--model", "model", "--prune.drop_layers", 5),
        "names layer 5; the model has layers 1 to 4, counted from 1",
    ),
    "heads that do not group": (
        "prune",
        (*PRUNE, "--prune.num_attention_heads", 3),
        "prune.num_attention_heads=3 is not a multiple of the model's 2 .*; choose 2 or 4",
    ),
}
