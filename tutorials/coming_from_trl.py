"""A DPOTrainer script and its evollm counterpart, argument by argument.

    python tutorials/coming_from_trl.py --out from-trl

You learn which argument goes where: of the agent, of the gym, or of the loop. With TRL you would write

    config = DPOConfig(
        output_dir="from-trl", learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0,
        beta=0.1, loss_type=["sigmoid"], max_grad_norm=1.0, max_length=512,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=8,
        eval_strategy="steps", eval_steps=4, save_steps=4, save_total_limit=2, seed=42, report_to="none",
    )
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model("from-trl/final")

The code below does the same. docs/from_trl.md has the names as a table, and what differs. Without further arguments it
takes the demo's model and pairs.
"""

from __future__ import annotations

import argparse

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import DPO, PreferenceGym, finetune_llm_preference
from evollm.demo import demo_model, demo_pairs


def main() -> None:
    """Do what the trainer in the docstring does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to score on")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="from-trl", help="run folder, which must be new")
    arguments = parser.parse_args()
    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    env = PreferenceGym(
        arguments.train or demo_pairs("train"),  # train_dataset
        arguments.test or demo_pairs("selection")[:16],  # eval_dataset
        tokenizer,  # processing_class
        data_batch_size_per_gpu=4,  # per_device_train_batch_size x gradient_accumulation_steps
        max_context_length=min(512, tokenizer.model_max_length, model.config.max_position_embeddings),  # max_length
        seed=42,
    )
    agent = DPO(
        actor_network=model,  # model
        lora_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),  # peft_config
        lr=1e-4,  # learning_rate, constant
        beta=0.1,
        loss_type=["sigmoid"],
        nll_alpha=0,  # the default of 1 adds the likelihood of the chosen side
        max_grad_norm=1.0,
        micro_batch_size_per_gpu=2,  # per_device_train_batch_size
        seed=42,
    )
    finetune_llm_preference(
        [agent],
        env,
        max_steps=arguments.steps,
        evaluation_interval=max(1, arguments.steps // 2),  # eval_steps
        checkpoint_steps=max(1, arguments.steps // 2),  # save_steps
        keep_last=2,  # save_total_limit
        run_dir=arguments.out,  # output_dir
        report_to="none",
    )
    agent.save_checkpoint(f"{arguments.out}/final")
    print(f"The adapter that trainer.save_model would write: {arguments.out}/final/actor")


if __name__ == "__main__":
    main()
