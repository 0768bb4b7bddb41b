"""The DPO example of the page that evollm's interface follows, with the package's name changed."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from conftest import make_rows
from datasets import Dataset
from peft import PeftModel

from evollm.algorithms import DPO
from evollm.llm_envs import PreferenceGym
from evollm.training.train_llm import finetune_llm_preference
from evollm.utils.utils import save_llm_checkpoint


def test_the_example_of_the_seed_page_runs_as_written(make_model, tokenizer, tmp_path, monkeypatch) -> None:
    """The page's script, imports included, with a local model and dataset in place of the hub's."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    accelerator = Accelerator()
    raw_dataset = Dataset.from_list(make_rows(40)).shuffle(seed=42)
    train_test_split = raw_dataset.train_test_split(test_size=0.1)
    train_dataset = train_test_split["train"]
    test_dataset = train_test_split["test"]
    env = PreferenceGym(
        train_dataset=train_dataset,
        test_dataset=test_dataset,
        tokenizer=tokenizer,
        data_batch_size_per_gpu=16,
        accelerator=accelerator,
    )
    agent = DPO(
        env.observation_space,
        env.action_space,
        actor_network=model,
        pad_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.eos_token,
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=32,
        lr=0.000005,
        beta=0.001,
        update_epochs=1,
        seed=42,
        accelerator=accelerator,
    )
    finetune_llm_preference(
        [agent],
        env,
        num_epochs=1,
        checkpoint_steps=250,
        accelerator=accelerator,
    )
    save_llm_checkpoint(agent, "path/to/checkpoint")
    PeftModel.from_pretrained(make_model(), "path/to/checkpoint")
