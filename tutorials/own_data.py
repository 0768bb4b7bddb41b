"""Your own pairs in your own chat template: see what becomes of every row, then train.

    python tutorials/own_data.py --train my-pairs.jsonl --test my-test-pairs.jsonl --template my-template.jinja

You learn what a row may look like, how to give a tokenizer a template, and how to see which rows were dropped, why, and
what the model really reads. Without `--train` it writes a small file with some bad rows and takes that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import DPO, PreferenceGym, finetune_llm_preference
from evollm.demo import demo_model, demo_pairs

TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def pair(question: str, good: str, bad: str) -> dict[str, Any]:
    """A row of chat messages."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


def write_example(path: Path) -> None:
    """The demo's pairs and three rows that cannot be used."""
    bad = [pair("Same?", "Yes.", "Yes."), pair("Empty?", "", "No."), {**pair("Role?", "A", "B"), "chosen": [{}]}]
    rows = [*demo_pairs("train")[:20], *bad]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Read the rows, show what they became, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to score on")
    parser.add_argument("--template", help="file with a Jinja chat template; a plain one by default")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="own-data", help="run folder, which must be new")
    arguments = parser.parse_args()
    train = Path(arguments.train or "own-data.jsonl")
    if arguments.train is None:
        write_example(train)

    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    # An instruct model has its own template, which is better for it than any other.
    tokenizer.chat_template = Path(arguments.template).read_text() if arguments.template else TEMPLATE

    env = PreferenceGym(str(train), arguments.test or demo_pairs("selection")[:8], tokenizer, data_batch_size_per_gpu=4)
    report = env.reports["train"]
    print(f"{report.kept} rows kept, {report.num_dropped} dropped")
    for reason, (count, rows) in report.dropped.items():
        print(f"  {count} x {reason}: rows {rows}")
    first = env.train_pairs[0]
    print("What the model reads of the first pair, without the rejected side:")
    print(tokenizer.decode([*first.prompt_ids, *first.chosen_ids]))

    agent = DPO(actor_network=model, lr=1e-4, beta=0.1, nll_alpha=0.1)
    finetune_llm_preference([agent], env, max_steps=arguments.steps, run_dir=arguments.out)


if __name__ == "__main__":
    main()
