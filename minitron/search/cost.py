"""What a shape costs where it will be used: memory by a formula, latency by a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minitron import platform
from minitron.model.arch import Architecture
from minitron.sections.search import DeploymentConfig

_REPEATS = 5


def memory_gb(arch: Architecture, deployment: DeploymentConfig) -> float:
    """Gigabytes (1e9 bytes) of all weights and of the key/value cache at full context.

    Activations and the workspace of an inference engine come on top.
    """
    cached = 2 * arch.num_layers * arch.kv_size * deployment.context * deployment.batch_size
    numbers = arch.num_parameters + cached
    return numbers * platform.DTYPES[deployment.dtype].itemsize / 1e9


class LatencyMeter:
    """Times requests to models of random weights on this process's device.

    A model is as many layers as it has, and a head. One layer of every width is timed, on the
    prompt and on one more token with a full cache; depth multiplies it, and no model is ever built.
    PyTorch runs it, matrices and attention and nothing fused: an inference engine is faster, on
    every shape. RoPE, a small part of every layer, is left out.

    Args:
        deployment: batch, context and dtype.
    """

    def __init__(self, deployment: DeploymentConfig) -> None:
        self._deployment = deployment
        self._layers: dict[tuple[int, ...], tuple[float, float]] = {}
        self._heads: dict[tuple[int, ...], float] = {}

    def seconds(self, arch: Architecture) -> float:
        """From a batch of prompts to the last token of the answers."""
        h, v = arch.hidden_size, arch.vocab_size
        width = (h, arch.ffn_hidden_size, arch.num_attention_heads, arch.num_query_groups)
        if width not in self._layers:
            self._layers[width] = self._time_layer(arch)
        if (h, v) not in self._heads:
            self._heads[h, v] = self._time_head(h, v)
        prompt, token = self._layers[width]
        later = self._deployment.generated - 1  # the prompt gives the first
        layers = arch.num_layers * (prompt + later * token)
        return layers + (1 + later) * self._heads[h, v]

    def _time_layer(self, arch: Architecture) -> tuple[float, float]:
        """Seconds of one layer for the prompt, and for one token after it."""
        use = self._deployment
        layer = _Layer(arch, self._random)
        cache = (use.batch_size, arch.num_query_groups, use.context, arch.kv_channels)
        keys, values = self._random(*cache), self._random(*cache)
        prompt = self._random(use.batch_size, use.context - use.generated, arch.hidden_size)
        token = self._random(use.batch_size, 1, arch.hidden_size)
        return (
            _median_seconds(lambda: layer(prompt)),
            _median_seconds(lambda: layer(token, cache=(keys, values))),
        )

    def _time_head(self, h: int, v: int) -> float:
        head, last = self._random(v, h), self._random(self._deployment.batch_size, h)
        norm = self._random(h)
        return _median_seconds(lambda: torch.nn.functional.rms_norm(last, (h,), norm) @ head.t())

    def _random(self, *shape: int) -> Tensor:
        dtype = platform.DTYPES[self._deployment.dtype]
        return torch.randn(shape, dtype=dtype, device=platform.device()) / shape[-1] ** 0.5


class _Layer:
    """A layer in plain PyTorch."""

    def __init__(self, arch: Architecture, random: Callable[..., Tensor]) -> None:
        h, f = arch.hidden_size, arch.ffn_hidden_size
        self._sizes = [arch.query_size, arch.kv_size, arch.kv_size]
        self._channels = arch.kv_channels
        self._norms = random(2, h)
        self._qkv = random(sum(self._sizes), h)
        self._proj = random(h, arch.query_size)
        self._fc1 = random(2 * f, h)
        self._fc2 = random(h, f)

    def __call__(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[b, s, h] → [b, s, h]; without a cache [b, g, c, d], tokens see those before them."""
        functional = torch.nn.functional
        qkv = functional.rms_norm(x, x.shape[-1:], self._norms[0]) @ self._qkv.t()
        query, key, value = (
            part.unflatten(2, (-1, self._channels)).transpose(1, 2)  # [b, n, s, d], [b, g, s, d]
            for part in qkv.split(self._sizes, dim=2)
        )
        if cache is not None:
            key, value = cache
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=cache is None, enable_gqa=key.size(1) != query.size(1)
        )
        x = x + attended.transpose(1, 2).flatten(2) @ self._proj.t()
        gate, up = (functional.rms_norm(x, x.shape[-1:], self._norms[1]) @ self._fc1.t()).chunk(
            2, dim=2
        )
        return x + (functional.silu(gate) * up) @ self._fc2.t()


@torch.no_grad()
def _median_seconds(run: Callable[[], Tensor]) -> float:
    """Median of a few runs, after one that does not count."""
    seconds = []
    for _ in range(1 + _REPEATS):
        platform.synchronize()
        start = time.perf_counter()
        run()
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
