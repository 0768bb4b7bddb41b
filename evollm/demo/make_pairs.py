"""Make the preference pairs of the demo: "short and direct is better than long-winded".

The prompts are original and stand in this file (``PROMPTS``), grouped by topic. For each prompt the very model that
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

Run: ``python evollm/demo/make_pairs.py --model FOLDER --out evollm/demo/pairs --seed 0``
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

PROMPTS = """
# sky
Why is the sky blue during the day?
Why does the sky turn red at sunset?
What causes a rainbow to appear?
What are clouds made of?
What is fog?
What is a sunrise?
What is a rainbow?
# weather
What is a snowflake?
What is hail?
# seasons
Why do leaves change color in autumn?
What is a fun thing to do in winter?
What is a snowman?
What do people enjoy about summer?
What is autumn?
# sleep
Why do people need sleep?
How can I fall asleep faster?
What is a dream?
Is a short afternoon nap good for me?
What is a blanket used for?
# water
Why is it important to drink water?
At what temperature does water boil?
What is the water cycle?
What is ice?
What is a well?
What is steam?
# tea
What is tea?
# coffee
How is coffee made?
Why does coffee keep people awake?
What is an espresso?
What is a cafe?
# bread
What can I do with stale bread?
What are the main ingredients of bread?
Why does bread smell so good when it bakes?
What is a sandwich?
# breakfast
What is a healthy breakfast?
Suggest a quick breakfast for a busy morning.
How do I make oatmeal taste better?
Suggest a breakfast that children like.
What is cereal?
What is yogurt?
# soup
What is an easy soup for a beginner?
How long can I keep soup in the fridge?
Why is soup popular in winter?
# fruit
How do I know when a mango is ripe?
What is a good fruit for a smoothie?
Is a tomato a fruit or a vegetable?
How should I store apples?
What does a pineapple taste like?
What is lemonade?
# vegetables
Why should we eat vegetables?
How can I make vegetables taste better?
Why do onions make people cry?
What is a potato?
# eggs
How do I boil an egg?
What is an omelette?
# cake
What is a good cake for a birthday?
What is a cupcake?
What is frosting?
# pasta
Which country is famous for pasta?
What is pizza?
# rice
Where is rice grown?
# spices
What does cinnamon taste like?
Which herbs go well with potatoes?
What is saffron?
Name a spice that is good in cookies.
# kitchen
How do I keep my kitchen clean?
What is a refrigerator used for?
What is a fork used for?
What is an oven used for?
What is a chef?
# cleaning
How do I remove a coffee stain from a shirt?
What is a good way to clean windows?
How can I get rid of dust at home?
Why is vinegar useful for cleaning?
What is a broom used for?
What is a sponge used for?
# laundry
How do I wash a wool sweater?
What is a washing machine used for?
What is a laundry basket used for?
# home
What is a good color for a bedroom wall?
What is a good place for a bookshelf?
What is a mirror used for?
What is a bookshelf used for?
What is a door?
# gardening
How often should I water tomato plants?
What tools does a beginner gardener need?
When is a good time to plant seeds?
What is a garden?
What is a greenhouse?
# houseplants
Why are the leaves of my plant turning yellow?
Why do people keep plants at home?
How do I water a cactus?
# trees
Why are trees important?
What is a rainforest?
What do trees need to grow?
What is a forest?
# flowers
What does a red rose stand for?
Why do bees visit flowers?
What is a sunflower?
Which flowers bloom in spring?
What is a rose?
What is a bouquet?
# bees
Why are bees important?
What is a beehive?
What is honey?
# dogs
How often should I walk my dog?
What is a good name for a puppy?
What should a dog not eat?
What is a puppy?
What does a guide dog do?
# cats
Why do cats purr?
Why do cats like boxes?
Why do cats scratch furniture?
What is a cat?
# birds
Why do birds sing in the morning?
Why do birds migrate?
What do owls eat?
Why do birds build nests?
# fish
How do fish breathe under water?
How often should I clean a fish tank?
Why do some fish swim in groups?
# insects
How does a caterpillar become a butterfly?
How do spiders make webs?
What is a ladybug?
What is a butterfly?
# wild animals
Why do giraffes have long necks?
Why do bears sleep in winter?
What is an elephant?
What is a kangaroo?
What is a zoo?
# farm
What do cows eat?
Why do farmers keep chickens?
What does a tractor do?
What is a farm?
What does a farmer do?
# ocean
What is a lighthouse for?
What is an ocean?
What is an island?
What is a dolphin?
# mountains
How are mountains formed?
What should I pack for a mountain hike?
What is a valley?
What is a glacier?
What is a cave?
# rivers
What is a river delta?
What is a pond?
# deserts
What is a desert?
# moon
Does the moon make its own light?
# planets
What is the biggest planet in our solar system?
What is a comet?
What is a telescope used for?
What does an astronaut do?
What is a rocket?
# sun
Why do plants need sunlight?
What is solar energy?
What is the sun made of?
# body
What do lungs do?
What does the brain do?
What does the stomach do?
# teeth
What does a dentist do?
What is a toothbrush used for?
# exercise
What is an easy exercise to do at home?
How can I stay motivated to exercise?
Why should I stretch before running?
What is yoga?
What is a gym?
# running
How do I choose running shoes?
How can I run faster?
# swimming
How do I learn to float in water?
Why do swimmers wear goggles?
What does a lifeguard do?
What is diving?
# cycling
Why should I wear a helmet on a bike?
# team games
Why is teamwork important in sports?
What does a referee do?
What does a coach do?
# board games
How do I get better at chess?
Why do people like puzzles?
What is a crossword?
What is chess?
What is a jigsaw puzzle?
What is a riddle?
# music
What is a melody?
What does a conductor do?
Why does music make people happy?
What is a piano?
What is an orchestra?
What is a concert?
# singing
How can I sing better?
What is a choir?
Why do people sing in the shower?
What is a song?
What is opera?
What is karaoke?
# painting
What are the three primary colors?
What is a portrait?
What is a good thing to paint for a beginner?
What is a painting?
What does an artist do?
What is an easel used for?
# photos
How do I take a good photo at night?
What is a selfie?
What is a good time of day for photos?
What does a camera lens do?
What is a camera?
What does a photographer do?
What is a photo album?
# books
What is a novel?
How can I read more books?
How do I choose a book as a gift?
What does an author do?
What is a book?
What is a bookmark used for?
# libraries
What is a library?
Why should we be quiet in a library?
What is an encyclopedia?
# writing
What is a poem?
How can I improve my handwriting?
What is a diary?
What is a rhyme?
What is a pen used for?
What is a letter?
What is a postcard?
What is an essay?
# school
How can I prepare for a test?
What should I put in a school bag?
What makes a good teacher?
What does a teacher do?
What is a classroom?
What is a backpack used for?
# learning
How do I stay focused while studying?
# numbers
What is a triangle?
What is a fraction?
Why is math useful in daily life?
What is a square?
What is a ruler used for?
# time
What is a calendar for?
What is a weekend?
# computers
How do I keep my computer clean?
What is a computer?
# phones
How do I clean my phone screen?
How can I spend less time on my phone?
# internet
What is a website?
What is an email?
What is a search engine?
What is a blog?
# trains
Why do trains run on tracks?
Why do people like to travel by train?
What is a train?
What is a train station?
# cars
Why do cars need oil?
Why should drivers take breaks on long trips?
What is a car?
What is a bus?
What is a taxi?
# planes
What should I pack in a carry-on bag?
What is a helicopter?
What is an airplane?
What is an airport?
What is a parachute used for?
# boats
What is a canoe?
Why do boats have life jackets?
What is a ferry?
What is a boat?
What is a harbor?
What is a submarine?
# travel
What is a passport for?
Why do people like to travel?
How do I choose a hotel?
What is a map used for?
What is a suitcase used for?
What is a compass used for?
# camping
What do I need for camping?
Why is a flashlight useful on a camping trip?
What is fun to do around a campfire?
What is a tent?
What is a picnic?
# cities
What is the capital of France?
What is a skyscraper?
Why do cities have parks?
What is a museum?
What does a mayor do?
What is a city?
What is a village?
# money
What is a budget?
What does a bank do?
How can I spend less on food?
# shopping
How do I choose a ripe watermelon?
What is a receipt?
What is a supermarket?
What is a bakery?
What does a cashier do?
# jobs
What does a baker do?
What does a firefighter do?
What does an architect do?
What does a plumber do?
What does a carpenter do?
What does a tailor do?
What does a gardener do?
What does a doctor do?
# friends
How do I say sorry to a friend?
# family
What is a good family activity for Sunday?
What can I do with my grandparents?
# parties
What is a good snack for a party?
What is a party?
What is a wedding?
# gifts
What is a good gift for a gardener?
Suggest a small homemade gift.
Why do people give gifts?
# feelings
What is courage?
What is kindness?
What is happiness?
What is patience?
What is a smile?
# manners
Why should I say thank you?
What does it mean to be honest?
What is a compliment?
What is respect?
# clothes
Why do people wear hats?
How do I choose a warm coat?
What is a sweater?
What is a raincoat for?
# materials
What is glass made of?
What is wood used for?
What is wool?
What is paper used for?
# tools
What does a screwdriver do?
How do I measure a room?
What is a saw used for?
# energy
What is a flashlight?
What is a solar panel?
"""


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
    splits = split_pairs(make_pairs(Sampler(args.model), read_queries(PROMPTS)), args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        write_rows(args.out / f"{name}.jsonl", pairs)
        print(f"{name}: {len(pairs)} rows")


if __name__ == "__main__":
    main()
