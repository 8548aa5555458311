#!/usr/bin/env bash
# Correct the teacher and distill from it in turns of EVERY steps, the teacher first, so that a student
# pruned from the original teacher learns from one that adapts to the data. One stage runs at a time,
# on all ranks. The other way is to correct the teacher first, with one recipe for train.py.
#
#     bash launch/correct_and_distill.sh STEPS EVERY OUT CORRECTION.yaml DISTILL.yaml
#
# OUT/teacher and OUT/student are one run of STEPS steps each, whose optimizer and learning rate go
# on from turn to turn; the recipes' own steps, teacher and out are not read. Started again, it goes
# on where it was stopped. RUN starts the stages:
#
#     RUN="torchrun --nproc-per-node 8" bash launch/correct_and_distill.sh 9960 996 /results/4b \
#         launch/recipes/llama3.1_8b_teacher_correction.yaml \
#         launch/recipes/llama3.1_4b_width_distill.yaml
set -euo pipefail

[[ $# -eq 5 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
steps=$1 every=$2 out=$3 correction=$4 distill=$5
launch=$(dirname "${BASH_SOURCE[0]}")
run=${RUN:-python}

begun=0
tracker=$out/student/checkpoints/latest_checkpointed_iteration.txt
[[ ! -e $tracker ]] || begun=$(<"$tracker")
# A turn that seems complete is looked at again: its model may not have been written.
for ((end = begun > 0 ? (begun - 1) / every * every : 0; end < steps; )); do
    end=$((end + every < steps ? end + every : steps))
    turn=(--train.steps "$steps" --until_step "$end" --resume)
    $run "$launch/train.py" --config "$correction" --out "$out/teacher" "${turn[@]}"
    $run "$launch/distill.py" --config "$distill" --teacher "$out/teacher" \
        --out "$out/student" "${turn[@]}"
done
echo "student: $out/student"
