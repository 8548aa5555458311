#!/usr/bin/env bash
# The main job in small: train a teacher, prune it in width and in depth, distill both students, and
# a student of random weights for comparison. Two CPU ranks; about six minutes on two cores.
#
#     make demo                     (or, inside an environment with minitron: bash launch/demo.sh)
#
# Everything is written below demo/, which is started anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS=1
started=$SECONDS
recipes=launch/recipes

say() { printf '\n\033[1m[%3ds] %s\033[0m\n' $((SECONDS - started)) "$*"; }
stage() { python "launch/$1.py" "${@:2}"; }
on_two_ranks() { torchrun --nproc-per-node 2 "launch/$1.py" "${@:2}"; }

rm -rf demo
mkdir demo

say "Text: the Python standard library, and its docstrings as a second, shifted distribution"
python -m minitron.data.stdlib demo/data
stage preprocess --data.path demo/data/source.train.jsonl \
    --tokenizer.train_vocab_size 2048 --out demo/data/source.train
for split in train valid; do
    stage preprocess --data.path "demo/data/docstrings.$split.jsonl" \
        --tokenizer demo/data/source.train.tokenizer --out "demo/data/docstrings.$split"
done

say "Teacher: a Llama trained on the source"
on_two_ranks train --config $recipes/demo_teacher.yaml

say "Importance of the teacher's channels, neurons, heads and layers"
on_two_ranks importance --config $recipes/demo_importance.yaml

say "Two students: pruned in width, pruned in depth; and one of random weights"
stage prune --config $recipes/demo_width_prune.yaml
stage prune --config $recipes/demo_depth_prune.yaml
stage train --config $recipes/demo_control.yaml

for student in width depth; do
    say "Distill the $student-pruned student on the docstrings"
    on_two_ranks distill --config $recipes/demo_distill.yaml \
        --student "demo/${student}_pruned" --out "demo/$student"
done
say "Distill the random student on the same tokens"
on_two_ranks distill --config $recipes/demo_distill.yaml \
    --student demo/random_init --out demo/random

say "Report"
stage report demo/teacher demo/width demo/depth demo/random demo/scores --out demo/report.html
printf '\nstudent:  %s\nreport:   %s\ntime:     %d min %d s\n' "$PWD/demo/width" \
    "$PWD/demo/report.html" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
