"""The description of a run's agents and data: settings for `config.json`, numbers of rows, and costs."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from inspect import signature

from evollm.algorithms import algorithm_of
from evollm.algorithms.agent import REFERENCE
from evollm.algorithms.references import BROKEN, REASON
from evollm.algorithms.saving import SavableAgent
from evollm.data.samples import Batch
from evollm.execution.executor import Costs, Description
from evollm.llm_envs import DatasetGym
from evollm.models.fingerprints import computing_settings
from evollm.version import __version__


def describe(first: SavableAgent, env: DatasetGym) -> Description:
    """Describe a population, by its first agent, and its data."""
    base = first.base
    config = {
        "algorithm": first.algorithm,
        "words": asdict(first.words),
        "base": base.name,
        "base_dtype": str(base.network.dtype),
        "base_fingerprint": base.weights_fingerprint,
        "device": str(first.device),
        "lora": computing_settings(base.adapters.config(first.actor_adapter)),
        "settings": first.settings.to_dict(),
        "hp_config": first.hp_config.to_dict() if first.hp_config else None,
        "data": {
            "batch_size": env.batch_size,
            "noun": env.row_format.noun,
            "form": env.form,
            "reports": [str(report) for report in env.reports.values()],
            "fingerprint": env.fingerprint,
            "digests": env.digests,
            "written_at": env.written_at.isoformat(),
            "position": env.state_dict(),
            **env.own_settings,
        },
        # evollm's version comes from the imported code, which may run without being installed.
        "versions": {"evollm": __version__}
        | {name: version(name) for name in ("torch", "transformers", "peft", "datasets")}
        | {"python": platform.python_version()},
    }
    if first.settings.depends_on_total:
        # A resumed run must share it: another number of steps gives other learning rates.
        config["lr_schedule"] = {"num_training_steps": first.num_training_steps}
    rows = {"train": len(env.train_pairs), "test": len(env.test_pairs), "final": len(env.final_pairs)}
    trusts = bool(base.model_config.get("trust_remote_code"))
    takes_rows = "rows" in signature(algorithm_of(first).evaluate).parameters
    why = f"{REASON}: {BROKEN}"
    if algorithm_of(first).collect is not None:
        why = f"rewards are NaN or infinite: correct the reward functions; or {why}"
    return Description(config, rows, len(env), _costs(first, env), first.hp_config, trusts, why, takes_rows)


def _costs(first: SavableAgent, env: DatasetGym) -> Costs:
    """What the first agent needs for the rows of each split."""
    flops, algorithm = first.base.flops, algorithm_of(first)
    has_reference, compares = algorithm.has_reference, algorithm.compares(first)
    # Of an epoch, since a set may be repeated, or have rows that come in later epochs.
    splits = {"train": env.epoch_pairs(0), "test": env.test_pairs, "final": env.final_pairs}
    batches = {split: Batch(pairs) for split, pairs in splits.items()}
    reference = first.adapter(REFERENCE) if has_reference else None
    evaluation = {split: flops.of(batches[split], first.actor_adapter) for split in ("test", "final")}
    references = {split: flops.of(batch, reference) * has_reference for split, batch in batches.items()}
    return Costs(
        training=flops.of(batches["train"], first.actor_adapter, training=True)
        + compares * flops.of(batches["train"], first.actor_adapter),
        evaluation=evaluation,
        references=references,
        kl=evaluation["test"] + references["test"],
        adapter=evaluation["test"] - flops.of(batches["test"], None),
        mismatched=compares * references["train"],
    )
