"""Several prompts in one call of `generate`, padded if their lengths differ, where a trial has found that to be right.

Decoders are padded on the left, since their answers follow the last column; the prompts of an encoder on the right. The
trial is `generate` itself with tokens that are forced on it, so that it covers what `generate` does: the mask, position
ids, the pass of the prompts, and passes of one token with a cache. What it says of these tokens is compared with the
model's own forward pass of each sequence alone, as in `evollm.models.probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from evollm.data.samples import Batch, IntArray
from evollm.models.flops import PROBE
from evollm.models.probe import BOUND, Trial, floor_of_long, make_differ, own_sums, random_adapters, random_pairs
from evollm.models.sampling import only_tokens
from evollm.models.shared_base import SharedBase

# Ways to answer several prompts in one call, each with what is done where its trial fails.
PADDED, TOGETHER = "padded", "together"
_OTHERWISE = {PADDED: "only prompts of one length are answered together", TOGETHER: "prompts are answered one by one"}

# Settings of transformers' `GenerationConfig` with which it searches greedily, for one answer to each prompt, until an
# end or `max_new_tokens`, and returns token ids alone.
_PLAIN: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "constraints": None,
    "force_words_ids": None,
    # An answer that it cut would look as if it had ended.
    "max_time": None,
    # Beside `max_new_tokens`, which is what counts, each call would say so.
    "max_length": None,
    "return_dict_in_generate": False,
}


class Columns(NamedTuple):
    """Prompts as the rows of one matrix.

    Attributes:
        ids: (n, P) token ids, where a row is padded its own first token: a setting such as `repetition_penalty`, which
            asks which tokens a row has, then sees no other ones, and no token without a usable embedding is read.
        mask: (n, P) 1 at a prompt's tokens, 0 at padding.
        start: The column at which answers begin in the output of `generate`.
    """

    ids: Tensor
    mask: Tensor
    start: int

    @classmethod
    def of(cls, base: SharedBase, prompts: Sequence[IntArray]) -> Columns:
        """Pad prompts to the length of the longest one, on the base's device."""
        width = max(map(len, prompts))
        ids = np.empty((len(prompts), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            columns = slice(len(prompt)) if base.is_encoder_decoder else slice(width - len(prompt), width)
            ids[row] = prompt[0]
            ids[row, columns] = prompt
            mask[row, columns] = 1
        # A decoder's output begins with its own start token, not with the prompt.
        start = 1 if base.is_encoder_decoder else width
        return cls(torch.from_numpy(ids).to(base.device), torch.from_numpy(mask).to(base.device), start)


def greedy_search(network: Any, columns: Columns, **settings: Any) -> Any:
    """The output of a model's `generate` for these prompts, with further arguments of it.

    Ways to decode, limits and outputs that the model's `generation_config` asks for do not count.
    """
    plain = {name: value for name, value in _PLAIN.items() if hasattr(network.generation_config, name)}
    return network.generate(input_ids=columns.ids, attention_mask=columns.mask, **{**plain, **settings})


@dataclass
class AnswerWays:
    """Whether several prompts may share a call, tried once for each way, LoRA configuration and length.

    Attributes:
        base: The base.
        reasons: Why not, "" if they may, by way (`PADDED`, `TOGETHER`), settings of the LoRA configuration and probed
            length.
    """

    base: SharedBase
    reasons: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def reason(self, way: str, settings: str, config: LoraConfig, longest: int, *, stacking: bool) -> str:
        """Why prompts may not share a call, "" if they may.

        Args:
            way: `PADDED`: prompts of different lengths; `TOGETHER`: of one length.
            settings: Settings of the LoRA configuration.
            config: Configuration of the members' adapters.
            longest: Tokens of the longest sequence, prompt and answer.
            stacking: Whether members share passes.
        """
        key = way, settings, longest
        if key not in self.reasons:
            trial = _padded if way == PADDED else _together
            self.reasons[key] = trial(self.base, config, longest, stacking=stacking)
        return self.reasons[key]

    def state_dict(self) -> list[list[Any]]:
        """All verdicts so far, as JSON."""
        return [[*key, reason] for key, reason in self.reasons.items()]

    @classmethod
    def from_state(cls, base: SharedBase, state: Any) -> AnswerWays:
        """The verdicts in an output of `state_dict`.

        Raises:
            TypeError, ValueError: `state` is not an output of `state_dict`.
        """
        found = cls(base)
        for way, settings, longest, reason in state:
            texts = isinstance(settings, str) and isinstance(reason, str)
            if way not in _OTHERWISE or type(longest) is not int or not texts:
                raise ValueError(f"{[way, settings, longest, reason]!r} does not say how prompts are answered")
            found.reasons[way, settings, longest] = reason
        return found


@torch.no_grad()
def _padded(base: SharedBase, config: LoraConfig, longest: int, *, stacking: bool) -> str:
    """Compare padded calls of `generate` with the model's own forward pass, on random tokens and adapters.

    One call has a long prompt, another one that is a quarter shorter and a very short one, so that padding is within
    and beyond attention windows, and there is more of it than in any call for answers. Another call has short prompts
    of two members in one pass.
    """
    long, *few = random_pairs(base, longest)
    cut = replace(long, prompt_ids=long.prompt_ids[len(long.prompt_ids) // 4 :])
    uneven = Batch([replace(pair, completions=pair.completions[:1]) for pair in (long, cut, few[-1])])
    short, trial = Batch(few), Trial()
    with random_adapters(base, config) as members:
        floor, _ = make_differ(base, members, short)
        own = own_sums(base, members[0], uneven)
        long_floor = max(floor, floor_of_long(base, members[0], long, own[0, 0]))
        bounds = BOUND * torch.tensor([long_floor, long_floor, floor])
        right = trial.agrees(_OTHERWISE[PADDED], lambda: _answered(base, members[:1], uneven), own, bounds)
        if right and stacking:
            _agree(trial, PADDED, base, members, short, BOUND * floor)
    return "".join(trial.reasons)


@torch.no_grad()
def _together(base: SharedBase, config: LoraConfig, longest: int, *, stacking: bool) -> str:
    """Compare a call of `generate` for short prompts of one length, as `_padded` does."""
    few, trial = random_pairs(base, longest)[1:], Trial()
    length = sorted(len(pair.prompt_ids) for pair in few)[-2]
    longer = [pair for pair in few if len(pair.prompt_ids) >= length]
    even = Batch([replace(pair, prompt_ids=pair.prompt_ids[-length:]) for pair in longer])
    with random_adapters(base, config) as members:
        floor, _ = make_differ(base, members, Batch(few))
        _agree(trial, TOGETHER, base, members if stacking else members[:1], even, BOUND * floor)
    return "".join(trial.reasons)


def _agree(trial: Trial, way: str, base: SharedBase, members: Sequence[str], batch: Batch, bound: float) -> None:
    """Compare a call of `generate` for a batch of each member."""
    own = torch.cat([own_sums(base, member, batch) for member in members])
    trial.agrees(_OTHERWISE[way], lambda: _answered(base, members, batch), own, torch.full((len(own),), bound))


def _answered(base: SharedBase, members: Sequence[str], batch: Batch) -> Tensor:
    """(M B, k) log-probs of completions that `generate` is made to answer with, in one call of all members."""
    base.flops.add(PROBE, batch, members)
    rows = [(sample, completion.ids) for _ in members for sample in batch for completion in sample.completions]
    most = max(len(ids) for _, ids in rows)
    # What follows a completion's end does not count.
    forced = torch.from_numpy(np.stack([np.pad(ids, (0, most - len(ids)), mode="edge") for _, ids in rows]))
    passing = base.routed(base.adapters.stack(members)) if len(members) > 1 else base.active(members[0])
    columns = Columns.of(base, [sample.prompt_ids for sample, _ in rows])
    with passing as network:
        output = greedy_search(
            network,
            columns,
            max_new_tokens=most,
            # A token or string that ends answers would end these early.
            eos_token_id=None,
            stop_strings=None,
            # It needs an EOS.
            exponential_decay_length_penalty=None,
            logits_processor=LogitsProcessorList([_Forced(forced.to(base.device), columns.start)]),
            output_logits=True,
            return_dict_in_generate=True,
        )
    steps = [
        logits.cpu().double().log_softmax(dim=-1).gather(1, forced[:, step, None])[:, 0]
        for step, logits in enumerate(output.logits)
    ]
    values = torch.stack(steps, dim=1)  # (rows, T)
    sums = torch.stack([row[: len(ids)].sum() for row, (_, ids) in zip(values, rows, strict=True)])
    return sums.view(len(members) * len(batch), -1)


class _Forced(LogitsProcessor):
    """Makes a greedy search say given tokens, (n, T), after the first `start` columns."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self._tokens = tokens
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return only_tokens(scores, self._tokens[:, input_ids.shape[1] - self._start])
