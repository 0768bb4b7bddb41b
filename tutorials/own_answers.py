"""Rounds of DPO on the model's own answers: answer prompts, let a judge order the answers, and learn from the pairs.

    python tutorials/own_answers.py --out own-answers

Each round begins with the best agent of the one before, whose answers its pairs are made of. The judge of this script
is a rule: an answer is better the nearer it is to 80 characters. Put your own in its place, such as a reward model.
Without further arguments the script takes the demo's model and prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import DPO, Judge, PreferenceGym, finetune_llm_preference
from evollm.data.cells import Row
from evollm.demo import demo_model, demo_pairs
from evollm.models.generation import Question, answers_to


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """Minus the distance of an answer's length from 80 characters."""
    del prompts
    return [-float(abs(len(completion) - 80)) for completion in completions]


def pairs_of(agent: DPO, env: PreferenceGym, rows: list[Row], options: argparse.Namespace, number: int) -> list[Row]:
    """The best and the worst of an agent's answers to each training prompt; prompts with equal answers are left out."""
    samples = env.train_pairs
    # The key makes each answer's random numbers: those of another round, prompt or answer are others.
    questions = [
        Question(agent.actor_adapter, sample.prompt_ids, temperature=1.0, key=(number, position, answer))
        for position, sample in enumerate(samples)
        for answer in range(options.answers)
    ]
    found = answers_to(agent.base, questions, env.tokenizer, options.tokens, top_p=0.95)
    texts = [str(env.tokenizer.decode(one.ids, skip_special_tokens=True)) for one in found]
    pairs = []
    for position, sample in enumerate(samples):
        prompt = rows[sample.row or 0]["prompt"]
        own = texts[position * options.answers : (position + 1) * options.answers]
        rewards = reward([prompt] * len(own), own)
        best, worst = (own[rewards.index(pick(rewards))] for pick in (max, min))
        if max(rewards) > min(rewards) and best.strip() and worst.strip():
            pairs.append({"prompt": prompt, "chosen": best, "rejected": worst})
    return pairs


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of pairs, of which the prompts are answered")
    parser.add_argument("--test", help="JSONL of pairs, whose prompts agents answer to be selected")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--out", default="own-answers", help="folder for the runs, which must be new")
    options = parser.parse_args()
    rows, held_out = (
        [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if path
        else demo_pairs(split)
        for path, split in ((options.train, "train"), (options.test, "test"))
    )
    if not options.train:
        rows, held_out = rows[:16], held_out[:8]

    name = options.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    given = PreferenceGym(rows, None, tokenizer)
    elite = None
    for number in range(1, options.rounds + 1):
        agents = DPO.population(2, actor_network=model, lr=5e-5, beta=0.1)
        agents[1].lr = 2e-4
        if elite is not None:
            for agent in agents:
                agent.load_checkpoint(str(elite), overwrite_reference_adapter=True)
        pairs = pairs_of(agents[0], given, rows, options, number)
        if not pairs:
            print(f"Round {number}: all answers to each prompt are equally good.")
            return
        print(f"Round {number}: {len(pairs)} pairs of answers of its own.")
        # The win rate is against the reference, the best agent of the round before.
        population, _ = finetune_llm_preference(
            agents,
            PreferenceGym(pairs, held_out, tokenizer, data_batch_size_per_gpu=4),
            num_epochs=1,
            judge=Judge(reward, prompts=8, max_new_tokens=options.tokens),
            fitness="win_rate",
            run_dir=Path(options.out) / f"round-{number}",
        )
        elite = Path(options.out) / f"round-{number}" / "elite"
        for agent in population:
            agent.release()


if __name__ == "__main__":
    main()
