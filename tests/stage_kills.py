"""SFT, DPO and GRPO on one base, as a script has them that is started again after each kill, and ways to kill it."""

from __future__ import annotations

import multiprocessing
import random
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_examples, make_rows
from faults import die
from peft import LoraConfig
from quick_page import quick_page
from small_run import digest
from tokenizers_for_tests import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from evollm import (
    DPO,
    GRPO,
    SFT,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RewardGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_reasoning,
    finetune_llm_sft,
)
from evollm.llm_envs.rewards import Rewards
from evollm.models.engine import Engine
from evollm.models.sampling import KeyedSampling
from evollm.report import write

STEPS = 5
STAGES = ("sft", "dpo", "grpo")
# What a step is in the middle of: sampling a token, scoring answers, the passes that one or all members learn by.
MOMENTS: dict[str, tuple[type, str]] = {
    "token": (KeyedSampling, "__call__"),
    "score": (Rewards, "of_answers"),
    "pass": (Engine, "backward"),
}


def brevity(completions: list[str]) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def run_stages(folder: Path, death: tuple[str, str, int] | None, counts: Mapping[str, Any]) -> None:
    """Begin the stages, or go on with the first one that has not ended.

    Args:
        folder: Has a run folder for each stage.
        death: Stage, moment and number of the call at which the process dies; None: it does not.
        counts: For each stage and moment a shared integer, to which calls are added.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Drawing takes longer than all the rest.
    write.render = quick_page
    for stage in STAGES:
        if not (folder / stage / "elite").exists():
            with ExitStack() as stack:
                for moment in MOMENTS:
                    at = death[2] if death is not None and death[:2] == (stage, moment) else None
                    stack.enter_context(_counted(moment, at, counts[f"{stage} {moment}"]))
                _run(folder, stage)


@contextmanager
def _counted(moment: str, at: int | None, count: Any) -> Iterator[None]:
    """Count the calls of a moment inside the block, and die at number `at`, from 0."""
    owner, name = MOMENTS[moment]
    function, calls = getattr(owner, name), iter(range(1 << 30))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            die()
        count.value += 1
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield


def _run(folder: Path, stage: str) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    # A process that is forked seeds `random` anew.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=128, initializer_range=0.2)
    base: dict[str, Any] = {
        "actor_network": LlamaForCausalLM(config),
        "lora_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "hp_config": HyperparameterConfig(lr=RLParameter(1e-3, 3e-2)),
        "lr": 1e-2,
        "gradient_checkpointing": False,
    }
    begun = (folder / stage / "config.json").exists()
    run: dict[str, Any] = {
        "resume_from_checkpoint" if begun else "run_dir": folder / stage,
        "max_steps": STEPS,
        "evaluation_interval": 1,
        "evo_steps": 2,
        "checkpoint_steps": 1,
        "tournament": TournamentSelection(2, True, 2, rand_seed=1),
        "mutation": Mutations(no_mutation=0.0, rl_hp=1.0, rand_seed=1),
        "save_elite": True,
        "num_sample_answers": 0,
        "verbose": False,
    }
    size = {"data_batch_size_per_gpu": 3}
    if stage == "sft":
        examples = SFTGym(make_examples(6), make_examples(3, 6), tokenizer, **size)
        finetune_llm_sft(SFT.population(2, **base), examples, **run)
    elif stage == "dpo":
        pairs = PreferenceGym(make_rows(6), make_rows(3, 6), tokenizer, **size)
        finetune_llm_preference(_from(folder / "sft/elite", DPO.population(2, **base)), pairs, **run)
    else:
        prompts = [{"prompt": row["prompt"]} for row in make_rows(9)]
        env = RewardGym(prompts[:6], prompts[6:], tokenizer, brevity, **size)
        agents = GRPO.population(2, **base, group_size=3, max_completion_length=4)
        finetune_llm_reasoning(_from(folder / "dpo/elite", agents), env, **run)


def _from(elite: Path, agents: list[Any]) -> list[Any]:
    for agent in agents:
        agent.load_checkpoint(str(elite))
    return agents


def killed_ends(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Ends of the stages: of a run that is never killed, and of one that is killed in each stage, and what was left.

    Returns:
        Digests of both runs' stages, and for each kill the newest checkpoint of the stage that it hit.
    """
    context = multiprocessing.get_context("forkserver")
    # What takes long to import; the process that forks finds no modules of the tests.
    context.set_forkserver_preload(["evollm", "transformers.models.llama.modeling_llama"])
    counts = {f"{stage} {moment}": context.Value("i", 0) for stage in STAGES for moment in MOMENTS}

    def started(name: str, death: tuple[str, str, int] | None = None) -> int | None:
        process = context.Process(target=run_stages, args=(folder / name, death, counts))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
        return process.exitcode

    assert started("whole") == 0
    newest = []
    whole = {key: count.value for key, count in counts.items()}
    for stage, moment in (("sft", "pass"), ("dpo", "pass"), ("grpo", "token"), ("grpo", "pass"), ("grpo", "score")):
        # In the second of the steps that this process makes, or in the third.
        calls = 2 * whole[f"{stage} {moment}"] // STEPS
        assert started("killed", (stage, moment, calls - calls // 4)) == -signal.SIGKILL
        newest.append(max(path.name for path in (folder / "killed" / stage / "checkpoints").iterdir()))
    assert started("killed") == 0
    ends = [[digest(folder / name / stage, STEPS) for stage in STAGES] for name in ("whole", "killed")]
    return ends[0], ends[1], newest
