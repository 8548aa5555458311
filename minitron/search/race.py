"""Successive halving: train all a little, keep the better ones, train those on.

A shape's loss right after pruning says little about its loss after distillation, and the ranking
goes on changing for some hundred steps. So entrants are judged little by little: at every rung the
worse part drops out, and what it would have cost to train goes to the better part. A rung before
the ranking has settled saves most, and may drop who would have won. An entrant whose loss is
infinite has diverged and drops out too; the race goes on without it.

The race knows neither models nor files. It asks for the loss of an entrant at a step; who answers
may remember, and a race that was interrupted is simply run again.

Source: arXiv:2407.14679 §4.3 trains all candidates for 400 steps and finds their ranks settled from
about step 300 on; halving is arXiv:1502.07943.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from minitron.errors import MinitronError
from minitron.metrics import log


def run_race(
    entrants: Sequence[str],
    rungs: Sequence[int],
    keep: float,
    loss_at: Callable[[str, int], float],
    drop_out: Callable[[str], None],
) -> str:
    """Race until one is left, who runs to the end all the same.

    Args:
        entrants: names; of equal losses the earlier one wins.
        rungs: steps at which losses are compared, the last one included.
        keep: part that stays at each rung but the last.
        loss_at: trains an entrant to a step and tells its loss there, infinity if it diverged.
        drop_out: called for those that do not go on.

    Returns:
        The entrant with the lowest loss at the last rung.

    Raises:
        MinitronError: all that still ran have diverged.
    """
    running = list(entrants)
    for rung in rungs:
        losses = {name: loss_at(name, rung) for name in running}
        ranked = sorted(running, key=losses.__getitem__)
        sound = sum(map(math.isfinite, losses.values()))
        if not sound:
            raise MinitronError(
                f"by step {rung} the training of {', '.join(ranked)} has diverged, and no shape is "
                "left; lower train.lr and search anew"
            )
        staying = 1 if rung == rungs[-1] else min(math.ceil(keep * len(ranked)), sound)
        log(
            f"step {rung}: "
            + ", ".join(f"{name} {losses[name]:.4f}" for name in ranked[:staying])
            + (f" go on, {len(ranked) - staying} drop out" if rung != rungs[-1] else " wins")
        )
        for name in ranked[staying:]:
            drop_out(name)
        running = [name for name in running if name in ranked[:staying]]
    return running[0]
