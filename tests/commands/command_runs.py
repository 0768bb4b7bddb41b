"""Runs of some steps, begun by the command line."""

from __future__ import annotations

from conftest import make_rows

from evollm.cli import main

# A run of two agents, four steps and two generations.
SHORT = (
    *("model=model", "population=2", "generations=2", "num_epochs=1", "data_batch_size_per_gpu=8", "lr=1e-4"),
    *("lora_config.r=2", "lora_config.target_modules=[q_proj]", "num_sample_answers=0"),
)
ROWS = make_rows(40)
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }
    for row in ROWS
]


def train(*arguments: str, data: str = "messages.jsonl") -> int:
    return main(["train", "--recipe", "population", f"data={data}", *SHORT, *arguments])
