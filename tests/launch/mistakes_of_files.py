"""Commands that go wrong because of data, runs or outputs, as `tests.launch.mistakes` has them."""

from tests.launch.mistakes import DATA, DISTILL, EVAL, TRAIN

OF_FILES = {
    # Data
    "no data": ("train", ("--model", "model", "--data", "no"), "no does not exist; data is a .txt"),
    "no tokenizer file": (
        "train",
        (*TRAIN, "--tokenizer", "no.model"),
        "--tokenizer.path no.model does not exist in .*; correct the path",
    ),
    "text without a tokenizer": (
        "eval",
        ("--model", "model", "--data", "text.txt"),
        "text.txt is text, but there is no tokenizer to encode it; give a model directory",
    ),
    "tokens of another tokenizer": (
        "eval",
        ("--model", "speaks_b", "--data", "tokens_a"),
        r"tokens_a.bin was tokenised with .*speaks_a/tokenizer.model \(\w+\), but .* speaks_b/tok",
    ),
    "token outside the vocabulary": (
        "train",
        ("--model", "model", "--data", "tokens99", "--data.seq_length", 16),
        r"tokens99.bin: token \d+, in document 0 .*, has id \d\d, but the vocabulary has 61; token",
    ),
    "validation token outside the vocabulary": (
        "train",
        (*TRAIN, "--data.valid_path", "tokens99"),
        "tokens99.bin: token .* but the vocabulary has 61",
    ),
    "store for a teacher": (
        "distill",
        ("--teacher", "store", "--student", "model", *DATA),
        "--teacher.path store is a store of a teacher's outputs, not a model; give it as --teacher",
    ),
    "too little data": (
        "train",
        ("--model", "model", "--data", "ten", "--data.seq_length", 16),
        r"ten.bin has 10 tokens, but a sample of data.seq_length=16 takes 16 \+ 1; give more text",
    ),
    "data cut short": (
        "importance",
        ("--model", "model", "--data", "cut"),
        "cut.bin has 500 bytes, but cut.idx describes 400 tokens of 2 bytes = 800; the files do",
    ),
    "weights for data read in order": (
        "eval",
        ("--model", "model", "--data", "0.5:tokens"),
        "data.path=0.5:tokens has a weight, but this data is read in order",
    ),
    "weights for some data": (
        "train",
        (*TRAIN, "--data", "0.5:tokens"),
        r"data.path=\['tokens', '0.5:tokens'\] has weights for some paths only; write all as",
    ),
    # Runs and checkpoints
    "resumed with another recipe": (
        "train",
        (*TRAIN, "--train.lr", 0.5, "--out", "run", "--resume"),
        "with another recipe than run/recipe.yaml: train.lr: 0.0001 -> 0.5; "
        "add --allow_change, or take the old values or another --out",
    ),
    "resumed by another stage, before models are loaded: this teacher would be refused": (
        "distill",
        (*DISTILL, "--out", "run", "--resume"),
        "--resume would continue a run with another recipe than run/recipe.yaml: .*distill",
    ),
    "resumed without a run": (
        "distill",
        (*DISTILL, "--out", "other", "--resume"),
        r"--resume cannot continue other, which is no run \(it has no recipe.yaml\); correct --out",
    ),
    "resumed with a damaged recipe": (
        "train",
        (*TRAIN, "--out", "damaged", "--resume"),
        "damaged/recipe.yaml is not a recipe; restore it, or choose another --out",
    ),
    "damaged checkpoint": (
        "train",
        (*TRAIN, "--out", "run", "--resume"),
        "run/checkpoints/iter_0000005 is not a torch_dist checkpoint",
    ),
    "step without a checkpoint": (
        "export",
        ("--checkpoint", "run", "--checkpoint.step", 3),
        "run/checkpoints does not hold a checkpoint of step 3; it has 5",
    ),
    "no run": (
        "export",
        ("--checkpoint", "no"),
        "--checkpoint.path no does not exist in ",
    ),
    "no training run": (
        "export",
        ("--checkpoint", "model"),
        "model is no training run, .* no directory checkpoints",
    ),
    "no such checkpoint": (
        "convert",
        ("--model", "model", "--checkpoint", "nowhere"),
        "--checkpoint.path nowhere does not exist in ",
    ),
    "no checkpoint": (
        "convert",
        ("--model", "model", "--checkpoint", "other"),
        "other is not a torch_dist checkpoint",
    ),
    "nothing to report": ("report", ("full", "--out", "out.html"), "full is not a run directory"),
    # Output
    "output that is a file": ("eval", (*EVAL, "--out", "file"), "--out file is a file; give a dir"),
    "output below a file": (
        "train",
        (*TRAIN, "--out", "file/sub"),
        "--out file/sub cannot be created: .*/file is a file; choose another",
    ),
    "output that is here": ("eval", (*EVAL, "--out", "."), "--out . is the working directory"),
    "output over a run": (
        "train",
        (*TRAIN, "--out", "run"),
        r"--out run is not empty \(it holds checkpoints and 2 more\); choose another directory or",
    ),
    "output over foreign files": (
        "importance",
        (*EVAL, "--out", "full", "--overwrite"),
        "--overwrite would delete full, which minitron did not write",
    ),
    "output over the input": (
        "export",
        ("--checkpoint", "run", "--out", "run", "--overwrite"),
        "--overwrite would delete run, but this stage reads run; choose another directory",
    ),
}
