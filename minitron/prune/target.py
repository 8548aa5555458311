"""The shape to reach: what a recipe asks for, made legal, with the arithmetic that led there."""

from __future__ import annotations

import dataclasses
import math

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.prune.depth import kept_layers
from minitron.sections.prune import WIDTHS, PruneConfig


def target_shape(config: PruneConfig, source: Architecture) -> Architecture:
    """The shape of the pruned model.

    Raises:
        MinitronError: it is larger than the source, or no valid Llama.
    """
    return _plan(config, source)[0]


def arithmetic(config: PruneConfig, source: Architecture) -> list[str]:
    """How the sizes came about, a line each; none unless rounding was asked for.

    Raises:
        MinitronError: as `target_shape` does.
    """
    return _plan(config, source)[1]


def _plan(config: PruneConfig, source: Architecture) -> tuple[Architecture, list[str]]:
    asked = {name: getattr(config, name) for name in (*WIDTHS, "num_layers")}
    asked = {name: size for name, size in asked.items() if size is not None}
    for name, size in asked.items():
        largest = getattr(source, name)
        if not 1 <= size <= largest:
            raise MinitronError(
                f"prune.{name}={size}, but the model has {largest}; choose 1 to {largest}"
            )
    multiple, tp = config.multiple, config.target_tensor_parallel_size
    rounding = _Rounding(source, asked, config.rounds, is_wanted=multiple > 1 or tp > 1)
    sizes, hidden = rounding.sizes, source.hidden_size
    keeps_hidden = "hidden_size" not in asked  # then the heads have to divide it as it is
    divides = f" that divides the hidden size, {hidden}" if keeps_hidden else ""

    all_groups, all_heads = source.num_query_groups, source.num_attention_heads
    merges = config.group_reduction == "mean"
    divisors = [g for g in range(1, all_groups + 1) if all_groups % g == 0]
    rounding.settle(
        "num_query_groups",
        [
            g
            for g in (divisors if merges else range(1, all_groups + 1))
            if (g % tp == 0 or tp % g == 0) and not (keeps_hidden and hidden % math.lcm(g, tp))
        ],
        f"multiple or divisor of {tp} ranks{divides}",
    )
    groups = sizes["num_query_groups"]
    if merges and groups not in divisors:
        raise MinitronError(
            f"prune.num_query_groups={groups} does not divide the model's {all_groups} "
            "key/value heads, whose neighbours prune.group_reduction=mean averages; choose "
            f"{_listed(divisors)}"
        )
    most = all_heads if merges else groups * (all_heads // all_groups)
    if "num_attention_heads" not in asked and most < all_heads:
        rounding.follow("num_attention_heads", most)
    unit = math.lcm(groups, tp)
    rounding.settle(
        "num_attention_heads",
        [n for n in range(unit, most + 1, unit) if not (keeps_hidden and hidden % n)],
        f"multiple of {unit} = lcm({groups} key/value heads, {tp} ranks){divides}",
    )
    heads = sizes["num_attention_heads"]
    _check_heads(config, heads, groups, most)
    unit = math.lcm(multiple, heads)
    rounding.settle(
        "hidden_size",
        list(range(unit, hidden + 1, unit)),
        f"multiple of {unit} = lcm({multiple}, {heads} heads, which transformers demands)",
        is_needed=False,
    )
    unit = multiple * tp
    rounding.settle(
        "ffn_hidden_size",
        list(range(unit, source.ffn_hidden_size + 1, unit)),
        f"multiple of {unit} = {multiple} x {tp} ranks",
        is_needed=source.ffn_hidden_size % tp != 0,
    )
    rounding.settle("num_layers", list(range(1, source.num_layers + 1)), "")
    if config.drop_layers:
        left = len(kept_layers(source.num_layers, config.drop_layers))
        if asked.get("num_layers", left) != left:
            raise MinitronError(
                f"prune.num_layers={asked['num_layers']} contradicts prune.drop_layers, which "
                f"leaves {source.num_layers} - {len(config.drop_layers)} = {left}; "
                "give one of the two"
            )
        sizes["num_layers"] = left
    target = dataclasses.replace(source, **sizes)
    hf.check_shape(target)
    return target, rounding.lines


def _check_heads(config: PruneConfig, heads: int, groups: int, most: int) -> None:
    if heads % groups:
        below = heads // groups * groups
        whose = "the model's " if config.num_query_groups is None else "prune.num_query_groups="
        raise MinitronError(
            f"prune.num_attention_heads={heads} is not a multiple of {whose}{groups} "
            f"key/value heads, each of which keeps the same number of query heads; choose "
            f"{f'{below} or ' if below else ''}{below + groups}"
        )
    if heads > most:
        raise MinitronError(
            f"prune.num_attention_heads={heads} in prune.num_query_groups={groups} are "
            f"{heads // groups} query heads each, but a key/value head of the model has "
            f"{most // groups}; choose at most {groups} x {most // groups} = {most}, or "
            "prune.group_reduction=mean"
        )


class _Rounding:
    """The sizes on their way from what is asked to what can be, with the arithmetic.

    What nobody asked to change is not rounded. It is refused where ranks cannot share it, and stays
    with a word about it where kernels would like it better otherwise.

    Args:
        source: the model.
        asked: sizes by name.
        rounds: in which they are to be reached, this one included.
        is_wanted: whether to round even in a single round.
    """

    def __init__(
        self, source: Architecture, asked: dict[str, int], rounds: int, *, is_wanted: bool
    ) -> None:
        self._largest = {name: getattr(source, name) for name in (*WIDTHS, "num_layers")}
        self.sizes = self._largest | asked
        self.lines: list[str] = []
        self._may_change = set(asked)
        self._is_wanted = is_wanted or rounds > 1
        self._ways: dict[str, str] = {}
        if rounds > 1:
            for name, size in asked.items():
                way = self._largest[name] - size
                self.sizes[name] = size + way - round(way / rounds)
                self._ways[name] = f"{size + way} to {size} in {rounds} rounds, now "

    def follow(self, name: str, size: int) -> None:
        """Set a size that follows from others and may be rounded as they are."""
        self.sizes[name] = size
        self._may_change.add(name)

    def settle(self, name: str, choices: list[int], kind: str, *, is_needed: bool = True) -> None:
        """Round a size to the nearest choice, the larger of two.

        Args:
            name: of the size.
            choices: what it may be.
            kind: what the choices are; empty if they are all there is.
            is_needed: whether a size that is not to change has to be one of them.

        Raises:
            MinitronError: there is no choice, or a size that is not to change is none.
        """
        size = self.sizes[name]
        if not self._is_wanted:
            return
        if name not in self._may_change:
            if size in choices:
                return
            if is_needed:
                raise MinitronError(
                    f"{name}={size} was not asked to change, and is no {kind}; give prune.{name}, "
                    "which is then rounded, or lower prune.target_tensor_parallel_size"
                )
            self.lines.append(f"{name}: stays {size}, no {kind}; give prune.{name} to round it")
            return
        if not choices:
            raise MinitronError(
                f"prune.{name}={size} cannot be rounded: the model has {self._largest[name]}, and "
                f"no smaller size is a {kind}; lower prune.multiple or "
                "prune.target_tensor_parallel_size, or give other sizes"
            )
        nearest = min(choices, key=lambda choice: (abs(choice - size), -choice))
        change = f"{size} -> {nearest}" if nearest != size else f"{size}"
        reason = f", a {kind}" if kind else ""
        if reason or name in self._ways:
            self.lines.append(f"{name}: {self._ways.get(name, '')}{change}{reason}")
        self.sizes[name] = nearest


def _listed(numbers: list[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last
