"""Is it right on a card? Attention against float64, packed and compiled against plain, and the same step twice."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from attention_used import packed_attention as attention_of_pairs
from gpu import Setting, random_model
from synthetic import Shape, make_population
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch
from evollm.models.attention import PackedSequences, SampleLengths, packed_attention, pair_attention
from evollm.models.engine import Engine, Item, ItemLoss, PassOptions
from evollm.models.logprobs import TokenLogprobs
from evollm.models.probe import FastPaths
from quarter_hour.running import Place

# Hidden size, feed-forward size, layers, heads, key-value heads, tied head: heads of 64, small enough for seconds.
SMALL = (512, 1536, 4, 8, 2, True)
TINY = (32, 64, 2, 4, 2, True)


class Heads(NamedTuple):
    """A case of attention."""

    size: int
    queries: int
    keys: int
    window: int | None


HEADS = [Heads(size, *heads, window) for size in (64, 128) for heads in ((8, 8), (14, 2)) for window in (None, 48)]
TOY_HEADS = [Heads(64, 2, 2, None), Heads(64, 4, 2, 9)]


def setting_of(place: Place, members: int = 8, steps: int = 20, limit: float = 25) -> Setting:
    """Where the parts of a call run.

    Raises:
        RuntimeError: There is no card, and this is no toy run.
    """
    if place.toy:
        return Setting(torch.device("cpu"), 2, 1, limit)
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device here: --toy runs everything at a tiny size on the CPU")
    return Setting(torch.device("cuda"), members, steps, limit)


def attention(place: Place) -> None:
    """The library's attention within pairs, and its gradients, against float64, and a dense one in bfloat16 too."""
    setting = setting_of(place)
    dtype = torch.bfloat16
    lengths = _lengths(place.toy)
    members = 2
    for number, heads in enumerate(TOY_HEADS if place.toy else HEADS):
        generator = torch.Generator(setting.device).manual_seed(number)
        inputs = [
            torch.randn(members, count, _tokens(lengths), heads.size, device=setting.device, generator=generator)
            for count in (heads.queries, heads.keys, heads.keys)
        ]
        upstream = torch.randn(members, _tokens(lengths), heads.queries, heads.size, device=setting.device)
        # Rounded first, so that all three read the same numbers.
        inputs, upstream = [tensor.to(dtype) for tensor in inputs], upstream.to(dtype)
        seen = _seen(lengths, heads.window, setting.device)
        exact = _with_gradients(lambda *qkv, seen=seen: _dense(*qkv, seen), [t.double() for t in inputs], upstream)
        dense = _with_gradients(lambda *qkv, seen=seen: _dense(*qkv, seen), inputs, upstream)
        found = _with_gradients(lambda *qkv, h=heads: _library(*qkv, lengths, h.window), inputs, upstream)
        errors = {n: _error(f, e) for n, f, e in zip(("out", "dq", "dk", "dv"), found, exact, strict=True)}
        usual = {n: _error(f, e) for n, f, e in zip(("out", "dq", "dk", "dv"), dense, exact, strict=True)}
        place.write(
            "attention",
            head_size=heads.size,
            heads=f"{heads.queries}/{heads.keys}",
            window=heads.window,
            dtype="bfloat16",
            ran=attention_of_pairs(setting.device, dtype, heads.size),
            errors=errors,
            dense_errors=usual,
            right=all(errors[n] <= max(3 * usual[n], 1e-3) for n in errors),
        )


def small_model(place: Place) -> None:
    """A small model's log-probs and gradients in packed and in plain passes, both against float32."""
    _compare(place, "packed", {"plain": False}, {"plain": True})


def compiled_model(place: Place) -> None:
    """A small model's log-probs and gradients with compiled layers and without, both against float32."""
    # Not at the tiny size, where compilation takes a minute all the same.
    _compare(place, "compiled", {"plain": False, "compiled": not place.toy}, {"plain": False})


def _compare(place: Place, name: str, options: Mapping[str, bool], usual_options: Mapping[str, bool]) -> None:
    """A row on how far log-probs and gradients are from float32, beside how far they are in the usual way."""
    setting = setting_of(place)
    sizes, shape = (TINY, Shape(8, 6, 7)) if place.toy else (SMALL, Shape())
    batch = shape.batch(3 if place.toy else 8, 500)
    torch.manual_seed(0)
    weights = random_model(sizes, 8192, setting.device, torch.bfloat16).state_dict()
    exact, _ = _gradients(weights, sizes, torch.float32, batch, setting, plain=True)
    usual, _ = _gradients(weights, sizes, torch.bfloat16, batch, setting, **usual_options)
    started = time.perf_counter()
    found, paths = _gradients(weights, sizes, torch.bfloat16, batch, setting, **options)
    seconds = time.perf_counter() - started
    errors = {key: _error(found[key], exact[key]) for key in exact}
    usual_errors = {key: _error(usual[key], exact[key]) for key in exact}
    place.write(
        f"{name} against plain",
        dtype="bfloat16",
        seconds=seconds,
        paths=paths.to_dict(),
        errors=errors,
        plain_errors=usual_errors,
        right=all(errors[key] <= max(3 * usual_errors[key], 1e-3) for key in errors),
    )


def same_step_twice(place: Place) -> None:
    """The bits of the adapters after the same two steps, with and without deterministic algorithms."""
    # Read when cuBLAS starts, which nothing in this process has made it do yet.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    setting = setting_of(place)
    sizes, shape = (TINY, Shape(8, 6, 7)) if place.toy else (SMALL, Shape())
    batches = [shape.batch(3 if place.toy else 8, 500, seed) for seed in range(2)]
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found = [_after_steps(sizes, batches, setting) for _ in range(2 if place.toy else 3)]
        except RuntimeError as error:
            place.write("same step twice", deterministic=deterministic, error=str(error).splitlines()[0])
            continue
        finally:
            torch.use_deterministic_algorithms(False)
        differing = sum(int((other != found[0]).sum()) for other in found[1:])
        place.write(
            "same step twice",
            deterministic=deterministic,
            equal=differing == 0,
            share_differing=differing / (found[0].numel() * (len(found) - 1)),
            largest=max(float((other - found[0]).abs().max()) for other in found[1:]),
        )


def _after_steps(sizes: Any, batches: Sequence[Batch], setting: Setting) -> Tensor:
    """All weights of two members' adapters after a step on each batch, from the same start."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
    model = random_model(sizes, 8192, setting.device, dtype)
    agents = make_population(model, 2, gradient_checkpointing=False, device=setting.device, seed=0)
    for batch in batches:
        learn_together(agents, batch)
    return torch.cat([p.detach().flatten().double() for agent in agents for p in agent.actor_parameters()])


def _gradients(
    weights: dict[str, Tensor],
    sizes: Any,
    dtype: torch.dtype,
    batch: Batch,
    setting: Setting,
    *,
    plain: bool,
    compiled: bool = False,
) -> tuple[dict[str, Tensor], FastPaths]:
    """Log-probs of two members and the gradients of their adapters, in float64, and the paths that they took."""
    model = random_model(sizes, 8192, setting.device, dtype)
    model.load_state_dict(weights)
    agents = make_population(model, 2, gradient_checkpointing=False, device=setting.device, seed=0)
    generator = torch.Generator().manual_seed(1)
    for agent in agents:
        for parameter in agent.actor_parameters():
            # LoRA's second matrix begins at zero, and with it the gradient of its first.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise.to(parameter)
    if compiled:
        agents[0].base.compile("default")
    engine = Engine.of(agents[0].base)
    names = [agent.actor_adapter for agent in agents]
    paths = engine.prepare(names, batch.longest_sequence)
    if plain:
        paths = FastPaths(False, False, False, paths.longest)
        engine.paths = dict.fromkeys(engine.paths, paths)
    found = engine.backward(Item.on(batch, names), PassOptions(), _sigmoid_loss())
    logprobs = torch.stack([column for member in found for column in (member.chosen, member.rejected)])
    gradients = [p.grad.flatten() for agent in agents for p in agent.actor_parameters() if p.grad is not None]
    return {"logprobs": logprobs.double(), "gradients": torch.cat(gradients).double()}, paths


def _sigmoid_loss() -> ItemLoss:
    def loss(members: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        return torch.stack(
            [-logsigmoid(0.1 * (member.chosen - member.rejected)).sum() for member in found.members]
        ).sum()

    return loss


def _lengths(toy: bool) -> tuple[SampleLengths, ...]:
    """A few pairs: usual, short, prompt longer than a window, sides shorter than one."""
    sizes = [(20, 7, 9), (3, 30, 2)] if toy else [(125, 40, 50), (4, 90, 3), (260, 9, 130), (33, 1, 64)]
    return tuple(SampleLengths(size[0], size[1:]) for size in sizes)


def _tokens(lengths: Sequence[SampleLengths]) -> int:
    return sum(sample.prompt + sum(sample.completions) for sample in lengths)


def _seen(lengths: Sequence[SampleLengths], window: int | None, device: torch.device) -> Tensor:
    """(N, N) True where a token sees another, by the definition: of its pair, not of the other side, not later."""
    tokens = [
        (number, side, position)
        for number, (prompt, completions) in enumerate(lengths)
        for side, (count, start) in enumerate([(prompt, 0), *((length, prompt) for length in completions)])
        for position in range(start, start + count)
    ]
    pair, side, position = (torch.tensor(column, device=device) for column in zip(*tokens, strict=True))
    other_side = (side[:, None] != side[None, :]) & (side[:, None] * side[None, :] > 0)
    distance = position[:, None] - position[None, :]
    seen = (pair[:, None] == pair[None, :]) & ~other_side & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def _dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention with a square mask, in the dtype of its inputs: (M, H, N, D) -> (M, N, H, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.softmax(dim=-1, dtype=wide).to(value.dtype) @ value).transpose(1, 2)


def _library(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[SampleLengths, ...], window: int | None
) -> Tensor:
    config = SimpleNamespace(_attn_implementation="sdpa", sub_configs={})
    with packed_attention(config, PackedSequences(lengths, query.device)):
        return pair_attention(nn.Identity(), query, key, value, None, sliding_window=window)[0]


def _with_gradients(compute: Any, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of the inputs, in float64."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = compute(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output))
    return [tensor.detach().double() for tensor in (output, *gradients)]


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the whole; nan stays nan, which no bound lets pass."""
    return float((found - exact).norm() / exact.norm())
