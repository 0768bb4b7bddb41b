"""Chat templates in the manner of the families that use them, written anew and shortened, and rows to write."""

from __future__ import annotations

from typing import Any

from tokenizers_for_tests import make_tokenizer
from transformers import PreTrainedTokenizerFast

from evollm.data import Sample, load_pairs
from evollm.data.preference_rows import PAIRS
from evollm.data.rows import RowFormat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The BOS is the template's; content is trimmed; tools stand in the system turn, calls and results are JSON.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{% for tool in tools or [] %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ system + '<|eot_id|>' }}"
    "{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' }}"
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# The system text opens the first user turn; tools stand before the last one; only answers end in EOS.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% set ns = namespace(last=0) %}{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' }}{{ m.content | tojson }}{{ '}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

# The answerer is called model, content is trimmed, and the system text goes to the first user turn.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Reasoning is written in the turns after the last question only, and cut from all before.
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content and not thought %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)

# A whole conversation ends in the EOS, behind the end of its last turn.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# The EOS ends every turn, whoever speaks.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

# The generation prompt opens a thought, and a conversation holds none.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

# Template, markers that are one token each, and BOS and EOS.
FAMILIES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "ChatML": (CHATML, [], {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "Llama 3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], {"eos_token": "<|eot_id|>"}),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], {}),
    "Gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "Qwen3": (QWEN3, ["<think>", "</think>", "<tool_call>", "</tool_call>"], {"eos_token": "<|im_end|>"}),
    "Phi": (PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], {"eos_token": "<|endoftext|>"}),
    "Zephyr": (ZEPHYR, [], {}),
    "DeepSeek-R1": (DEEPSEEK_R1, ["<|User|>", "<|Assistant|>", "<think>", "</think>"], {}),
}
WITH_TOOLS = ("Llama 3", "Mistral", "Qwen3")


def family_tokenizer(family: str, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's template, which puts `<s>` in front of plain text unless told otherwise."""
    template, markers, special = FAMILIES[family]
    more: dict[str, Any] = {"additional_special_tokens": markers} if markers else {}
    return make_tokenizer(adds_bos=adds_bos, chat_template=template, **special, **more)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, USER = said("system", "Answer in one word."), said("user", "What colour is the sky?")
BLUE, GREEN, AGAIN = said("assistant", "Blue."), said("assistant", "  Green,\nmaybe. "), said("user", "Are you sure?")
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks at the sky",
        "parameters": {"type": "object", "properties": {"direction": {"type": "string"}}},
    },
}
CALL = said(
    "assistant",
    "",
    tool_calls=[{"type": "function", "function": {"name": "look_up", "arguments": {"direction": "north"}}}],
)
RESULT = said("tool", 'clear, "blue"', name="look_up")

ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
    "system": {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]},
    "turns": {"prompt": [SYSTEM, USER, GREEN, AGAIN], "chosen": [BLUE], "rejected": [GREEN]},
    "turns in a completion": {"prompt": [USER], "chosen": [BLUE, AGAIN, BLUE], "rejected": [GREEN, AGAIN, GREEN]},
    "tool call": {"prompt": [USER], "chosen": [CALL], "rejected": [BLUE], "tools": [LOOK]},
    "tool result": {"prompt": [SYSTEM, USER, CALL, RESULT], "chosen": [BLUE], "rejected": [GREEN], "tools": [LOOK]},
    "reasoning": {
        "prompt": [USER],
        "chosen": [said("assistant", "Blue.", reasoning_content="The sky scatters.")],
        "rejected": [said("assistant", "Green.", reasoning_content="Like grass.")],
    },
    "a switch": {
        "prompt": [USER],
        "chosen": [BLUE],
        "rejected": [GREEN],
        "chat_template_kwargs": {"enable_thinking": False},
    },
}


def template_ids(tokenizer: Any, row: dict[str, Any], *side: dict[str, Any], generation: bool = False) -> list[int]:
    """What the model is given at inference, by the tokenizer's own method."""
    encoding = tokenizer.apply_chat_template(
        [*row["prompt"], *side],
        tools=row.get("tools"),
        add_generation_prompt=generation,
        return_dict=True,
        **row.get("chat_template_kwargs", {}),
    )
    return list(encoding["input_ids"])


def only(tokenizer: Any, row: dict[str, Any], row_format: RowFormat = PAIRS, **limits: Any) -> Sample:
    (pair,), _ = load_pairs([row], tokenizer, name="train", row_format=row_format, **limits)
    return pair
