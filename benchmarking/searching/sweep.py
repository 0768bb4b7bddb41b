"""Train every configuration of a seed to the end, and record what each scores on every pair.

Members that never inherit from each other are independent, so that all strategies without inheritance can be computed
from the record; `contestants.py` does.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from evollm import DPO, HyperparameterConfig, PreferenceGym
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch, Sample
from evollm.models import AdapterState
from evollm.models.engine import Engine, Item, PassOptions
from searching.finalists import candidates_of
from searching.problem import Founder, Sizes
from searching.records import Array, Record

EVALUATION_PAIRS = 64
KL_PAIRS = 16
ANSWERED_PROMPTS = 16
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Sweep:
    """What a sweep trains, and on what.

    Attributes:
        name: Of the data.
        network: The base.
        tokenizer: Its tokenizer.
        splits: Training, selection and final pairs.
        sizes: How large it is.
        seed: Of the order of the data and of the adapters.
        bounds: Of the hyperparameters.
        lora: The adapters' configuration.
        token_budget: Tokens in a pass; None: evollm's default.
        gradient_checkpointing: As of an agent.
    """

    name: str
    network: Any
    tokenizer: Any
    splits: tuple[Sequence[Any], Sequence[Any], Sequence[Any]]
    sizes: Sizes
    seed: int
    bounds: HyperparameterConfig
    lora: LoraConfig
    token_budget: int | None = None
    gradient_checkpointing: bool | None = None

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return next(self.network.parameters()).device

    def gym(self, *, final: bool = True) -> PreferenceGym:
        """The environment; the same batches in every call. `final`: with the final pairs."""
        train, selection, final_pairs = self.splits
        return PreferenceGym(
            train,
            selection,
            self.tokenizer,
            data_batch_size_per_gpu=self.sizes.batch_size,
            final_dataset=final_pairs if final else None,
            seed=self.seed,
        )

    def agent(self, **settings: Any) -> DPO:
        """An agent on the base."""
        return DPO(
            actor_network=self.network,
            lora_config=self.lora,
            seed=self.seed,
            batch_size=self.sizes.batch_size,
            use_separate_reference_adapter=False,
            token_budget=self.token_budget,
            gradient_checkpointing=self.gradient_checkpointing,
            device=self.device,
            **settings,
        )

    def scheduled(self, hyperparameters: Mapping[str, Any], **settings: Any) -> DPO:
        """An agent with warm-up and cosine decay over a whole run."""
        agent = self.agent(lr_scheduler_type="cosine", warmup_ratio=0.1, **hyperparameters, **settings)
        agent.num_training_steps = self.sizes.steps
        return agent


class Judge:
    """Scores adapters on the pairs of a sweep, against the base without adapter."""

    def __init__(self, agent: DPO, gym: PreferenceGym, sizes: Sizes, tokenizer: Any) -> None:
        self._base = agent.base
        self._engine = Engine.of(agent.base)
        self._options = PassOptions(token_budget=agent.token_budget)
        self._tokenizer = tokenizer
        self.pairs: dict[str, Sequence[Sample]] = {"selection": gym.test_pairs, "final": gym.final_pairs}
        self._measured = gym.final_pairs[: sizes.measured_kl]
        self._references: dict[str, Array] = {}

    def logratios(self, adapters: Sequence[str], split: str) -> Array:
        """(adapters, 2, pairs) log pi - log ref of chosen and rejected completions, in nats."""
        if split not in self._references:
            self._references[split] = self._logprobs([None], split)
        return (self._logprobs(adapters, split) - self._references[split]).astype(np.float32)

    def kl(self, adapters: Sequence[str]) -> Array:
        """(adapters, pairs) KL(pi || ref) over the vocabulary, summed over the tokens of the chosen completions."""
        found: list[list[float]] = [[] for _ in adapters]
        for start in range(0, len(self._measured), KL_PAIRS):
            pairs = self._measured[start : start + KL_PAIRS]
            reference = self._distribution(None, pairs)
            for row, adapter in zip(found, adapters, strict=True):
                ours = self._distribution(adapter, pairs)
                divergence = (ours.exp() * (ours - reference)).sum(-1)
                lengths = [len(pair.chosen_ids) for pair in pairs]
                row += [float(part.sum()) for part in divergence.split(lengths)]
        return np.array(found, dtype=np.float32)

    def answer_lengths(self, adapter: str | None) -> list[int]:
        """Tokens of greedy answers to the first final prompts, at most `ANSWER_TOKENS`."""
        prompts = [pair.prompt_ids.tolist() for pair in self._measured[:ANSWERED_PROMPTS]]
        end, longest = self._tokenizer.eos_token_id, max(map(len, prompts))
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=self._base.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._base.device)
        with self._base.active(adapter) as network, torch.no_grad():
            output = network.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=end
            )
        return [[*answer, end].index(end) for answer in output[:, longest:].tolist()]

    def _logprobs(self, adapters: Sequence[str | None], split: str) -> Array:
        pairs = self.pairs[split]
        columns: list[Array] = []
        with torch.no_grad():
            for start in range(0, len(pairs), EVALUATION_PAIRS):
                batch = Batch(pairs[start : start + EVALUATION_PAIRS])
                found = self._engine.logprobs(Item.on(batch, adapters), self._options)
                sums = [torch.stack(list(one.sums().columns)) for one in found]
                columns.append(torch.stack(sums).double().cpu().numpy())
        return np.concatenate(columns, axis=2)

    def _distribution(self, adapter: str | None, pairs: Sequence[Sample]) -> torch.Tensor:
        """(tokens of all chosen completions, vocabulary) log-probs."""
        rows = [np.concatenate([pair.prompt_ids, pair.chosen_ids]) for pair in pairs]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._base.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._base.device)
        with self._base.active(adapter) as network, torch.no_grad():
            logits = network(input_ids=ids, attention_mask=mask).logits
        parts = [
            logits[number, len(row) - len(pair.chosen_ids) - 1 : len(row) - 1]
            for number, (row, pair) in enumerate(zip(rows, pairs, strict=True))
        ]
        return torch.log_softmax(torch.cat(parts).float(), dim=-1)


def record(sweep: Sweep, founders: Sequence[Founder], path: Path, *, answers: bool, say: Callable[[str], None]) -> None:
    """Train all founders and write the record, first without candidates, so that the end of the time loses little."""
    started = time.perf_counter()
    sizes, gym = sweep.sizes, sweep.gym()
    agents = [
        sweep.agent(index=number, **founder.hyperparameters)
        if founder.kind == "default"
        else sweep.scheduled(founder.hyperparameters, index=number)
        for number, founder in enumerate(founders)
    ]
    judge = Judge(agents[0], gym, sizes, sweep.tokenizer)
    selection, kept, losses, operations = [], [], [], []
    actors = [agent.actor_adapter for agent in agents]
    flops = agents[0].base.flops
    for step in range(1, sizes.steps + 1):
        batch = gym.next_batch()
        operations.append([flops.of(batch, actors[0], training=True), flops.of(batch, None)])
        losses.append([metrics["loss"] for metrics in learn_together([a for a in agents if not a.diverged], batch)])
        if any(agent.diverged for agent in agents):
            raise SystemExit(f"{path}: agents have diverged: {[a.index for a in agents if a.diverged]}")
        if step in sizes.rung_steps:
            selection.append(judge.logratios(actors, "selection"))
            if step < sizes.steps:
                kept.append([agent.base.adapters.export(actor) for agent, actor in zip(agents, actors, strict=True)])
            say(f"step {step} of {sizes.steps}, {time.perf_counter() - started:.0f} s")
    about = {
        **described(sweep),
        "founders": [asdict(founder) for founder in founders],
        "candidates": [],
        "answer_lengths": {},
        "seconds": {"training and selection": time.perf_counter() - started},
    }
    final = judge.logratios(actors, "final")
    none = np.zeros((0, 2, 0), np.float32)
    found = Record(
        about,
        selection=np.stack(selection, axis=1),
        final=final,
        kl=judge.kl(actors),
        candidates_selection=none,
        candidates_final=none,
        candidates_kl=none[:, 0],
        losses=np.array(losses, np.float32).T,
        step_operations=np.array(operations),
        pair_operations=np.array([flops.of(Batch([pair]), actors[0]) for pair in judge.pairs["selection"]]),
    )
    about["seconds"]["final"] = time.perf_counter() - started
    found.save(path)
    _with_candidates(found, judge, agents, kept, answers=answers).save(path)
    say(f"written, {time.perf_counter() - started:.0f} s")


def _with_candidates(
    found: Record, judge: Judge, agents: Sequence[DPO], kept: Sequence[Sequence[AdapterState]], *, answers: bool
) -> Record:
    """The record with the scores of merges, scaled adapters and earlier weights."""
    started = time.perf_counter()
    adapters = agents[0].base.adapters
    actors = [agent.actor_adapter for agent in agents]
    candidates = candidates_of(found.selection, agents[0].base, actors, kept)
    selection, final, kl = [], [], []
    lengths = {}
    for candidate in candidates:
        name = adapters.frozen(candidate.state, "reference")
        selection.append(judge.logratios([name], "selection")[0])
        final.append(judge.logratios([name], "final")[0])
        kl.append(judge.kl([name])[0])
        if answers and candidate.is_answered:
            lengths[candidate.name] = judge.answer_lengths(name)
        adapters.release(name)
    if answers:
        lengths["reference"] = judge.answer_lengths(None)
        best = candidates[0].members[0]
        lengths[f"founder {best}"] = judge.answer_lengths(actors[best])
    about = dict(found.about)
    about["candidates"] = [candidate.described() for candidate in candidates]
    about["answer_lengths"] = lengths
    about["seconds"] = {**about["seconds"], "candidates": time.perf_counter() - started}
    changed = {
        "about": about,
        "candidates_selection": np.stack(selection),
        "candidates_final": np.stack(final),
        "candidates_kl": np.stack(kl),
    }
    return Record(**{**vars(found), **changed})


def described(sweep: Sweep) -> dict[str, Any]:
    """What a record says of where it comes from."""
    device = sweep.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "data": sweep.name,
        "seed": sweep.seed,
        "model": str(sweep.network.config._name_or_path).rsplit("/", 1)[-1],
        "dtype": str(sweep.network.dtype).removeprefix("torch."),
        "lora": {"r": sweep.lora.r, "alpha": sweep.lora.lora_alpha},
        "sizes": {**asdict(sweep.sizes), "steps": sweep.sizes.steps, "rung_steps": sweep.sizes.rung_steps},
        "machine": name,
        "date": str(date.today()),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
