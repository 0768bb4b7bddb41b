"""Make the preference pairs of the demo: "short and direct is better than long-winded".

The prompts are original and stand in ``prompts.txt``, grouped by topic. For each prompt the very model that
the demo trains samples several answers: some to the plain prompt, some with a hidden instruction (such as "Reply with
one short, simple sentence.") that is added while sampling only and is never part of the stored prompt. One fixed rule
then ranks a prompt's answers:

* an answer counts only if the model ended it itself with its end-of-sequence token and it is neither a list, nor a
  refusal, nor talk about the model or the hidden instruction;
* chosen is the shortest answer of 4 to 25 tokens that is one declarative sentence, shares a word with the prompt, adds
  a word to it and repeats none of its own;
* rejected is the longest answer of at most 70 tokens with at least 2.5 times as many tokens as chosen.

Lengths are token counts of the stored text plus one end-of-sequence token. A prompt without such a pair is skipped.
The rule looks at length and form, never at whether an answer is true. When the list of prompts was written, those that
the model answered plainly wrong, or not in short form, were taken out of it by hand; a few more (``LEFT_OUT``) are left
out after sampling. The rows are split by topic, so no topic is in two of ``train.jsonl``, ``selection.jsonl`` and
``final.jsonl``.

Each row is a JSON object with ``prompt``, ``chosen`` and ``rejected``, each a list of one chat message. For one model,
one machine and one set of library versions, the output is the same for the same seed.

Run: ``python benchmarking/demo_pairs/make_pairs.py --model FOLDER --out evollm/demo/pairs --seed 0``
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MIN_CHOSEN_TOKENS = 4
MAX_CHOSEN_TOKENS = 25
MAX_REJECTED_TOKENS = 70
MIN_LENGTH_RATIO = 2.5
BATCH_SIZE = 64
SPLIT_ROWS = {"final": 64, "selection": 48, "train": 160}
# Enough to tell agents apart; each costs a forward pass for every agent and generation.
SELECTION_ROWS = 24

META_PATTERN = re.compile(
    r"\b(as an ai|ai (assistant|model|language)|language model|smollm|hugging face|i'm sorry|i apologi[sz]e|i can't"
    r"|i cannot|i don't have|i'm (not|here|ready|happy|unable)|(short|simple|one|two|three|single) sentences?"
    r"|the sentence|(the|your|this) (question|prompt|answer)|here('s| is| are)|sure|certainly|you asked|ten words"
    r"|classic|conundrum|debated)\b",
    re.IGNORECASE,
)
LIST_PATTERN = re.compile(r"\n|\s\d\.\s|\*\*|:\s*$|\[|\]|_")
CHILD_PATTERN = re.compile(r"\b(child|children|kids?)\b", re.IGNORECASE)
COMMON_PATTERN = re.compile(
    "about|also|and|because|can|does|from|good|have|how|into|like|make|many|often|people|should|some|that|the|their"
    "|them|these|they|this|use|used|what|when|which|with|you|your"
)

# Prompts left out once their pairs were read: a false chosen answer, or a religious turn in the rejected one.
LEFT_OUT = frozenset(
    {
        "What is a choir?",
        "What is a sandwich?",
        "What is a weekend?",
        "What is the biggest planet in our solar system?",
    }
)

PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclass(frozen=True)
class Query:
    """A prompt of ``PROMPTS`` with the topic it stands under."""

    topic: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A complete answer and its number of tokens, end-of-sequence token included."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """One way to sample an answer to every prompt.

    Attributes:
        instruction: Hidden instruction added to the user message, empty for none.
        temperature: Sampling temperature, 0 for greedy decoding.
        max_tokens: Largest number of new tokens.
    """

    instruction: str
    temperature: float
    max_tokens: int


SHORT_SAMPLINGS = (
    Sampling("Answer in one simple sentence for a child.", 0.0, MAX_CHOSEN_TOKENS),
    Sampling("Reply with one short, simple sentence.", 0.0, MAX_CHOSEN_TOKENS),
    Sampling("Keep the answer under ten words, in one sentence.", 0.0, MAX_CHOSEN_TOKENS),
)
LONG_SAMPLINGS = (
    Sampling("Answer in two or three sentences.", 0.7, MAX_REJECTED_TOKENS),
    Sampling("Explain in a short paragraph.", 0.7, MAX_REJECTED_TOKENS),
    Sampling("Answer in two or three sentences.", 0.7, MAX_REJECTED_TOKENS),
    Sampling("", 0.7, MAX_REJECTED_TOKENS),
    Sampling("Explain in a short paragraph.", 0.7, MAX_REJECTED_TOKENS),
    Sampling("Answer in two or three sentences.", 0.7, MAX_REJECTED_TOKENS),
    Sampling("Explain in a short paragraph.", 0.7, MAX_REJECTED_TOKENS),
)


def read_queries(text: str) -> list[Query]:
    """Parse the prompt list: a line ``# topic`` opens a topic, every other line is a prompt.

    Args:
        text: The prompt list.

    Returns:
        The prompts in order.

    Raises:
        ValueError: A prompt stands twice in the list.
    """
    queries: list[Query] = []
    topic = ""
    for line in text.strip().splitlines():
        if line.startswith("# "):
            topic = line[2:]
        else:
            queries.append(Query(topic, line))
    if len({query.text for query in queries}) != len(queries):
        raise ValueError("a prompt stands twice in the list")
    return queries


class Sampler:
    """Samples complete answers from a chat model on the CPU."""

    def __init__(self, folder: str) -> None:
        """Load the model and its tokenizer.

        Args:
            folder: Hugging Face model folder.
        """
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.train(False)

    def sample(self, queries: Sequence[Query], sampling: Sampling) -> Iterator[Answer | None]:
        """Sample one answer to each prompt.

        Args:
            queries: The prompts.
            sampling: How to sample.

        Yields:
            The answer to each prompt in order, None where the model did not end it by itself.
        """
        for start in range(0, len(queries), BATCH_SIZE):
            batch = [query.text for query in queries[start : start + BATCH_SIZE]]
            yield from self._sample_batch(batch, sampling)

    def _sample_batch(self, prompts: Sequence[str], sampling: Sampling) -> list[Answer | None]:
        inputs = self._tokenizer(
            [self._render(prompt, sampling.instruction) for prompt in prompts],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 40}
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=sampling.max_tokens, **options)
        return [self._to_answer(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _render(self, prompt: str, instruction: str) -> str:
        message = {"role": "user", "content": f"{prompt} {instruction}".strip()}
        return str(self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))

    def _to_answer(self, ids: list[int]) -> Answer | None:
        eos = self._tokenizer.eos_token_id
        if eos not in ids:
            return None
        text = self._tokenizer.decode(ids[: ids.index(eos)], skip_special_tokens=True).strip()
        return Answer(text, len(self._tokenizer(text, add_special_tokens=False)["input_ids"]) + 1)


def is_plain(answer: Answer) -> bool:
    """Tell whether an answer is neither a refusal nor meta text nor a list."""
    return not (META_PATTERN.search(answer.text) or LIST_PATTERN.search(answer.text)) and answer.text.isascii()


def is_short_sentence(answer: Answer) -> bool:
    """Tell whether an answer can be the chosen one: one declarative sentence of the right length."""
    one_sentence = re.fullmatch(r"[A-Z0-9][^.!?]*(?:\d\.\d[^.!?]*)*[.!]", answer.text) is not None
    return one_sentence and MIN_CHOSEN_TOKENS <= answer.tokens <= MAX_CHOSEN_TOKENS


def content_words(text: str) -> list[str]:
    """Return the words of a text that carry meaning, cut to six letters so that word forms fall together."""
    words = re.findall(r"[a-z]{3,}|[0-9]+", text.lower())
    return [word[:6] for word in words if not COMMON_PATTERN.fullmatch(word)]


def fits_prompt(query: Query, answer: Answer) -> bool:
    """Tell whether a short answer speaks about its prompt, adds a word to it and repeats no word of its own."""
    asked, said = set(content_words(query.text)), content_words(answer.text)
    child_talk = CHILD_PATTERN.search(answer.text) and not CHILD_PATTERN.search(query.text)
    return bool(asked & set(said)) and bool(set(said) - asked) and len(set(said)) == len(said) and not child_talk


def pick_chosen(query: Query, answers: Sequence[Answer]) -> Answer | None:
    """Pick the shortest answer that is one plain sentence, if there is one."""
    fit = [answer for answer in answers if is_plain(answer) and is_short_sentence(answer)]
    fit = [answer for answer in fit if fits_prompt(query, answer)]
    return min(fit, key=lambda answer: answer.tokens, default=None)


def pick_rejected(chosen: Answer, answers: Sequence[Answer]) -> Answer | None:
    """Pick the longest answer within the limit that is long enough beside the chosen one, if there is one."""
    least = MIN_LENGTH_RATIO * chosen.tokens
    fit = [answer for answer in answers if is_plain(answer) and least <= answer.tokens <= MAX_REJECTED_TOKENS]
    return max(fit, key=lambda answer: answer.tokens, default=None)


@dataclass
class Candidate:
    """A prompt on its way to a pair.

    Attributes:
        query: The prompt.
        chosen: The best short answer so far, None for none.
        rejected: The best long answer so far, None for none.
        answers: All complete answers so far.
    """

    query: Query
    chosen: Answer | None = None
    rejected: Answer | None = None
    answers: list[Answer] = field(default_factory=list)

    def add(self, answer: Answer | None) -> None:
        """Take in one more answer and rank anew.

        Args:
            answer: The answer, None for one that is not complete.
        """
        if answer is not None:
            self.answers.append(answer)
            self.chosen = pick_chosen(self.query, self.answers)
            self.rejected = pick_rejected(self.chosen, self.answers) if self.chosen else None

    def to_row(self) -> dict[str, Any]:
        """Return the pair as a row of the output."""
        if self.chosen is None or self.rejected is None:
            raise ValueError(f"no pair for: {self.query.text}")
        return {
            "prompt": [{"role": "user", "content": self.query.text}],
            "chosen": [{"role": "assistant", "content": self.chosen.text}],
            "rejected": [{"role": "assistant", "content": self.rejected.text}],
        }


def sample_round(sampler: Sampler, candidates: Sequence[Candidate], sampling: Sampling) -> None:
    """Sample one answer to each prompt in one way and add it to the prompt's answers.

    Args:
        sampler: The model.
        candidates: The prompts.
        sampling: The way to sample.
    """
    started = time.perf_counter()
    answers = sampler.sample([candidate.query for candidate in candidates], sampling)
    for candidate, answer in zip(candidates, answers, strict=True):
        candidate.add(answer)
    print(f"{sampling}: {len(candidates)} prompts, {time.perf_counter() - started:.0f} s", flush=True)


def make_pairs(sampler: Sampler, queries: Sequence[Query]) -> list[Candidate]:
    """Sample and rank answers in rounds, each over the prompts that still lack a chosen or a rejected answer.

    Args:
        sampler: The model.
        queries: The prompts.

    Returns:
        The prompts with a pair, in the order of the prompts.
    """
    candidates = [Candidate(query) for query in queries]
    for sampling in SHORT_SAMPLINGS:
        sample_round(sampler, [candidate for candidate in candidates if not candidate.chosen], sampling)
    with_chosen = [candidate for candidate in candidates if candidate.chosen]
    print(f"{len(candidates) - len(with_chosen)} of {len(candidates)} prompts skipped: no chosen answer", flush=True)
    for sampling in LONG_SAMPLINGS:
        sample_round(sampler, [candidate for candidate in with_chosen if not candidate.rejected], sampling)
    pairs = [candidate for candidate in with_chosen if candidate.rejected]
    print(f"{len(with_chosen) - len(pairs)} of {len(candidates)} prompts skipped: no rejected answer", flush=True)
    return [pair for pair in pairs if pair.query.text not in LEFT_OUT]


def split_pairs(pairs: Sequence[Candidate], seed: int) -> dict[str, list[Candidate]]:
    """Split pairs by topic: topics in random order fill one split after the other, each cut to its size.

    Of the selection's pairs the first `SELECTION_ROWS` are kept.

    Args:
        pairs: The pairs.
        seed: Seed of the order.

    Returns:
        The pairs of each split.
    """
    topics = sorted({pair.query.topic for pair in pairs})
    random.Random(seed).shuffle(topics)
    splits: dict[str, list[Candidate]] = {}
    for name, size in SPLIT_ROWS.items():
        rows: list[Candidate] = []
        while topics and len(rows) < size:
            topic = topics.pop()
            rows += [pair for pair in pairs if pair.query.topic == topic]
        splits[name] = rows[:size]
        random.Random(seed).shuffle(splits[name])
    splits["selection"] = splits["selection"][:SELECTION_ROWS]
    return splits


def write_rows(path: Path, pairs: Sequence[Candidate]) -> None:
    """Write pairs to a file, one JSON object per line.

    Args:
        path: The file.
        pairs: The pairs.
    """
    lines = [json.dumps(pair.to_row(), ensure_ascii=False) + "\n" for pair in pairs]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Make the pairs and write the three files."""
    parser = argparse.ArgumentParser(description="Make the preference pairs of the demo.")
    parser.add_argument("--model", required=True, help="Hugging Face folder of the chat model")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the output may depend on it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    splits = split_pairs(make_pairs(Sampler(args.model), read_queries(PROMPTS.read_text(encoding="utf-8"))), args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        write_rows(args.out / f"{name}.jsonl", pairs)
        print(f"{name}: {len(pairs)} rows")


if __name__ == "__main__":
    main()
