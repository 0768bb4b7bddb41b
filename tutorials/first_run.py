"""Tune one agent on preference pairs, and see what became of it: the smallest whole program.

    python tutorials/first_run.py --out first-run

You learn which three objects a run needs (a model, a gym, an agent), what the terminal shows, and what lies in the run
folder afterwards. Without further arguments it takes the demo's model and pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import DPO, PreferenceGym, finetune_llm_preference
from evollm.demo import demo_model, demo_pairs


def main() -> None:
    """Train one agent, then read its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to score on")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="first-run", help="run folder, which must be new")
    arguments = parser.parse_args()

    # A model, and its own tokenizer.
    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    # The gym turns the pairs into token ids and serves batches.
    env = PreferenceGym(
        arguments.train or demo_pairs("train"),
        arguments.test or demo_pairs("selection")[:16],
        tokenizer,
        data_batch_size_per_gpu=4,
    )

    # The agent is a LoRA adapter on the model. nll_alpha keeps the chosen answers likely; 0 would be plain DPO.
    agent = DPO(actor_network=model, lr=1e-4, beta=0.1, nll_alpha=0.1, max_grad_norm=1.0)
    finetune_llm_preference([agent], env, max_steps=arguments.steps, run_dir=arguments.out)

    # Everything that happened is in the run folder.
    lines = [json.loads(line) for line in (Path(arguments.out) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    print(f"\nLoss of the first and last batch: {losses[0]:.3f}, {losses[-1]:.3f}")
    print(f"Files: {', '.join(sorted(path.name for path in Path(arguments.out).iterdir() if path.name[0] != '.'))}")


if __name__ == "__main__":
    main()
