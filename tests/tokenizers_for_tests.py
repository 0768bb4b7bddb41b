"""Small real tokenizers: a byte-level BPE that knows a few words, and the ways that models differ in their markers."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the answer is yes, the other answer is no",
    "what is the answer to the question? the question has another answer",
    "user and assistant and system: yes or no",
]
MARKERS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRINGS_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NO_EOS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    *, adds_bos: bool = False, adds_eos: bool = False, lowercase: bool = False, **kwargs: object
) -> PreTrainedTokenizerFast:
    """A tokenizer with EOS "</s>"; `kwargs` go to `PreTrainedTokenizerFast` and may say otherwise."""
    tokenizer = Tokenizer.from_str(_trained())
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    if adds_eos:
        eos = ("</s>", tokenizer.token_to_id("</s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[eos])
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>"} | kwargs)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM's manner: the turn's end is EOS and padding, the turn's start is a BOS that plain text does not get."""
    markers = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return make_tokenizer(chat_template=CHATML, **markers)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's manner: every text ends with EOS, and nothing opens it."""
    return make_tokenizer(adds_eos=True)


def bos_template_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's manner: the tokenizer adds a BOS, and the template writes one as well."""
    return make_tokenizer(adds_bos=True, chat_template=BRINGS_BOS)


def no_eos_template_tokenizer() -> PreTrainedTokenizerFast:
    """A template whose assistant turn ends in a newline only, and that refuses system messages."""
    return make_tokenizer(chat_template=NO_EOS)
