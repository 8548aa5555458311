#!/usr/bin/env bash
# Prune in rounds. Each scores the model of the round before and prunes its part of the way to the
# shape of the pruning recipe, in width, depth or both; with a distillation recipe, the result learns
# from the first model before the next round, so that a large model becomes a small one by way of
# those in between.
#
#     bash launch/chain.sh ROUNDS MODEL OUT IMPORTANCE.yaml PRUNE.yaml [DISTILL.yaml]
#
# Round i writes OUT/i/scores, OUT/i/pruned and OUT/i/distilled; the recipes' own model, teacher,
# student, scores and out are not read. Started again, it goes on where it was stopped; what is
# complete is not made again, whatever the recipes say by then. RUN starts the stages, all on
# the same ranks:
#
#     RUN="torchrun --nproc-per-node 8" bash launch/chain.sh 2 /models/Llama-3.1-8B /results/chain ...
set -euo pipefail

[[ $# -eq 5 || $# -eq 6 ]] || { sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" >&2; exit 2; }
rounds=$1 teacher=$2 out=$3 importance=$4 prune=$5 distill=${6:-}
launch=$(dirname "${BASH_SOURCE[0]}")
run=${RUN:-python}

is_complete() { [[ -e $1/manifest.json ]]; }

model=$teacher
for ((left = rounds; left > 0; left--)); do
    round=$out/$((rounds - left + 1))
    is_complete "$round/scores" ||
        $run "$launch/importance.py" --config "$importance" --model "$model" --out "$round/scores"
    is_complete "$round/pruned" ||
        $run "$launch/prune.py" --config "$prune" --model "$model" --scores "$round/scores" \
            --prune.rounds "$left" --out "$round/pruned"
    model=$round/pruned
    if [[ -n $distill ]]; then
        is_complete "$round/distilled" ||
            $run "$launch/distill.py" --config "$distill" --teacher "$teacher" --student "$model" \
                --resume --out "$round/distilled"
        model=$round/distilled
    fi
done
echo "student: $model"
