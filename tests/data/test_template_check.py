"""Text of chat rows that a template leaves out or moves: counted, named with its rows, and warned of once."""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import pytest
import rich.console
from chat_templates import (
    AGAIN,
    BLUE,
    CALL,
    CHATML,
    DEEPSEEK_R1,
    FAMILIES,
    GREEN,
    LOOK,
    QWEN3,
    RESULT,
    ROWS,
    SYSTEM,
    USER,
    WITH_TOOLS,
    family_tokenizer,
    said,
)
from tokenizers_for_tests import make_tokenizer

from evollm import PreferenceGym, SFTGym
from evollm.data import DataReport, load_pairs
from evollm.data.completion_rows import EXAMPLES
from evollm.data.template_check import ALIKE, NOTHING_LEFT, QUESTION_SCORED
from evollm.data.tokenization import TOO_LONG, UNLIKE_INFERENCE
from evollm.errors import DataError
from evollm.inspection import inspect_data, print_inspection

# Only users and assistants are written.
TWO_ROLES = "{% for m in messages if m.role in ('user', 'assistant') %}" + CHATML.partition("%}")[2]
# The system text is written into the last message, if that is a user's.
INTO_LAST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n' %}{% elif m.role == 'user' %}"
    "{{ '[INST]' + (ns.system if loop.last else '') + m.content + '[/INST]' }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
# The system text is written behind the question, whatever follows.
AT_THE_END = (
    "{% for m in messages if m.role != 'system' %}{{ '[' + m.role + ']' + m.content }}"
    "{% if m.role == 'user' %}{% for s in messages if s.role == 'system' %}{{ '\n' + s.content }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
CUTS_THOUGHTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
TRUNCATES = CHATML.replace("m.content", "m.content[:12]")
QUOTES = CHATML.replace("m.content", "m.content | tojson")
WRAPS = CHATML.replace("m.content", "(m.content | wordwrap(8))")
AS_XML = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<function=' + call.function.name + '>' }}{% for name, value in call.function.arguments | items %}"
    "{{ '<parameter=' + name + '>' + (value | string) + '</parameter>' }}{% endfor %}{% endfor %}{% endfor %}"
)

THOUGHT_BLUE, THOUGHT_GREEN = (
    said("assistant", f"<think>I looked {where}.</think>{answer}")
    for where, answer in (("up", "Blue."), ("down", "Green."))
)


def thinking(answer: str, thought: str, name: str = "reasoning_content") -> dict[str, Any]:
    return said("assistant", answer, **{name: thought})


def row(*prompt: dict[str, Any], chosen: Any = BLUE, rejected: Any = GREEN, **more: Any) -> dict[str, Any]:
    lists = [side if isinstance(side, list) else [side] for side in (chosen, rejected)]
    return {"prompt": list(prompt) or [USER], "chosen": lists[0], "rejected": lists[1], **more}


def without(part: str) -> str:
    return f"without {part}, which the chat template leaves out"


def report_of(template: str, *rows: dict[str, Any], **arguments: Any) -> DataReport:
    return load_pairs(list(rows), make_tokenizer(chat_template=template), name="train", **arguments)[1]


LOST_SYSTEM = without("the content of an earlier system message")
LOST: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "system": (TWO_ROLES, row(SYSTEM, USER), [LOST_SYSTEM]),
    "system that moves": (INTO_LAST, row(SYSTEM, USER), [LOST_SYSTEM, QUESTION_SCORED]),
    "developer": (
        TWO_ROLES,
        row(said("developer", "Be brief."), USER),
        [without("the content of an earlier developer message")],
    ),
    "name of who asks": (
        CHATML,
        row(said("user", "What colour?", name="Ann")),
        [without("the name of an earlier user message")],
    ),
    "call of OpenAI's older kind": (
        CHATML,
        row(
            USER, said("assistant", "I look.", function_call={"name": "look_up", "arguments": '{"to": "north"}'}), AGAIN
        ),
        [without("the tool call of an earlier assistant message")],
    ),
    "thoughts in content": (
        CUTS_THOUGHTS,
        row(chosen=THOUGHT_BLUE, rejected=THOUGHT_GREEN),
        [without("the reasoning of the completion")],
    ),
    "thoughts in earlier content": (
        QWEN3,
        row(USER, THOUGHT_GREEN, AGAIN),
        [without("the reasoning of an earlier assistant message")],
    ),
    "reasoning_content": (
        CHATML,
        row(chosen=thinking("4", "two and two"), rejected=thinking("5", "a guess")),
        [without("the reasoning_content of the completion")],
    ),
    "thinking": (
        CHATML,
        row(chosen=thinking("4", "two and two", "thinking")),
        [without("the thinking of the completion")],
    ),
    "the same words said before": (
        CUTS_THOUGHTS,
        row(
            said("user", "I looked up. What colour?"),
            chosen=THOUGHT_BLUE,
            rejected=said("assistant", "<think>What colour?</think>Green."),
        ),
        [without("the reasoning of the completion")],
    ),
    "the end of a message": (
        TRUNCATES,
        row(rejected=said("assistant", "Green, and nothing else.")),
        [
            without("the content of an earlier user message"),
            without("the content of the completion"),
        ],
    ),
    "tools": (CHATML, row(tools=[LOOK]), [without("the tools, or some of them")]),
    "the description of a tool": (
        "{{ tools[0].function.name }}" + CHATML,
        row(tools=[LOOK]),
        [without("the tools, or some of them")],
    ),
    "an earlier tool call": (
        CHATML,
        row(USER, CALL, RESULT),
        [without("the tool call of an earlier assistant message")],
    ),
    "arguments of a tool call": (
        CHATML.replace("m.content", "(m.tool_calls[0].function.name if m.tool_calls else m.content)"),
        row(chosen=CALL),
        [without("the tool call of the completion")],
    ),
    "a role": (
        TWO_ROLES,
        row(USER, said("observation", "blue")),
        [
            without("the content of an earlier observation message"),
            "with the role 'observation', which the chat template does not name",
        ],
    ),
    "a role that is written": (
        CHATML,
        row(said("User", "What colour?")),
        ["with the role 'User', which the chat template does not name"],
    ),
    "an argument": (
        QWEN3,
        row(chat_template_kwargs={"enable_thinkng": False}),
        ["with 'enable_thinkng' in chat_template_kwargs, which the chat template does not use"],
    ),
    "what opens an answer": (DEEPSEEK_R1, row(), [UNLIKE_INFERENCE]),
}


@pytest.mark.parametrize("case", LOST)
def test_what_the_template_leaves_out_or_moves_is_said(case: str) -> None:
    template, lossy, expected = LOST[case]
    found = report_of(template, lossy)
    assert found.kept == 1
    assert sorted(found.noted) == sorted(expected)
    for remark in expected:
        assert f"1 {remark}: row 0" in str(found)


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "trimmed": (CHATML.replace("m.content", "m.content | trim"), row(said("user", " \nWhat?\n "), rejected=GREEN)),
    "wrapped": (WRAPS, row(said("user", "What is the colour of the sky today?"))),
    "as JSON": (QUOTES, row(said("user", 'What "is"\n\tthe café\\?'))),
    "as JSON in ASCII": (QUOTES.replace("tojson", "tojson(ensure_ascii=True)"), row(said("user", 'A "café"\n?'))),
    "system behind the question": (AT_THE_END, row(SYSTEM, USER)),
    "system texts gathered at the beginning": (
        DEEPSEEK_R1.replace("<think>\n", ""),
        row(USER, BLUE, SYSTEM, said("system", "Be brief."), AGAIN),
    ),
    "thoughts on lines of their own": (QWEN3, row(chosen=THOUGHT_BLUE, rejected=THOUGHT_GREEN)),
    "an empty thought that is dropped": (CUTS_THOUGHTS, row(chosen=said("assistant", "<think>\n\n</think>\n\nBlue."))),
    "arguments as XML": (
        AS_XML,
        row(
            USER, said("assistant", "", tool_calls=[{"name": "x", "function": {"name": "look", "arguments": {"n": 7}}}])
        ),
    ),
    "arguments as JSON text": (
        QWEN3,
        row(
            USER,
            said(
                "assistant", "", tool_calls=[{"function": {"name": "look", "arguments": json.dumps({"at": 'a "b"'})}}]
            ),
            RESULT,
        ),
    ),
    "a role that the template names": (
        CHATML + "{# 'observation' #}",
        row(USER, said("observation", "blue")),
    ),
    "repeated words": (CHATML, row(USER, BLUE, USER, BLUE, USER)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_in_another_way_is_not_missed(case: str) -> None:
    template, whole = WRITTEN[case]
    assert report_of(template, whole).noted == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["one turn", "system", "turns", "turns in a completion", "tool call", "tool result"])
def test_nothing_is_missed_in_what_a_family_writes(family: str, case: str) -> None:
    if "tool" in case and family not in WITH_TOOLS:
        pytest.skip("its template knows no tools")
    _, report = load_pairs([ROWS[case]], family_tokenizer(family), name="train")
    assert [*report.noted] == ([UNLIKE_INFERENCE] if family == "DeepSeek-R1" else [])


@pytest.mark.parametrize(
    ("template", "lossy", "reason"),
    [
        (
            CUTS_THOUGHTS,
            row(chosen=THOUGHT_BLUE, rejected=said("assistant", "<think>I guess.</think>\nBlue.")),
            f"{ALIKE} (without the reasoning of the completion)",
        ),
        (
            CHATML,
            row(chosen=thinking("4", "two and two"), rejected=thinking("4", "a guess")),
            f"{ALIKE} (without the reasoning_content of the completion)",
        ),
        (
            TWO_ROLES,
            row(chosen=said("Assistant", "Blue."), rejected=said("Assistant", "Green.")),
            f"{ALIKE} (without the content of the completion; with the role 'Assistant', which the chat template does "
            "not name)",
        ),
        (CHATML, row(chosen=CALL), f"{NOTHING_LEFT} (without the tool call of the completion)"),
        (CHATML.replace("m.content", "m.content | trim"), row(rejected=said("assistant", "Blue.\n")), ALIKE),
    ],
)
def test_a_row_is_dropped_whose_difference_is_what_the_template_leaves_out(
    template: str, lossy: dict[str, Any], reason: str
) -> None:
    found = report_of(template, row(), lossy)
    assert found.dropped == {reason: (1, (1,))}
    assert found.noted == {}


def test_sides_that_differ_in_whitespace_alone_are_a_pair_where_it_is_written() -> None:
    assert report_of(CHATML, row(rejected=said("assistant", "Blue.\n"))).kept == 1


def test_an_example_of_which_nothing_is_written_is_dropped() -> None:
    rows = [{"messages": [USER, CALL]}, {"messages": [USER, BLUE]}]
    found = report_of(CHATML, *rows, row_format=EXAMPLES)
    assert found.dropped == {f"{NOTHING_LEFT} (without the tool call of the completion)": (1, (0,))}


def test_rows_are_counted_with_the_first_of_them_and_those_that_are_dropped_are_not() -> None:
    lossy, whole = row(SYSTEM, USER), row()
    rows = [whole, lossy, row(SYSTEM, USER, chosen=said("assistant", "blue " * 99)), *[lossy] * 7]
    found = report_of(TWO_ROLES, *rows, max_context_length=90)
    assert found.dropped == {TOO_LONG: (1, (2,))}
    assert found.noted == {LOST_SYSTEM: (8, (1, 3, 4, 5, 6))}
    assert str(found).endswith(f"; warning: 8 {LOST_SYSTEM}: rows 1, 3, 4, 5, 6, ...")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("gym", [PreferenceGym, SFTGym])
def test_a_gym_warns_once_and_says_the_split_the_rows_and_the_remedy(gym: Any, kept: bool, tmp_path: Any) -> None:
    rows = [row(SYSTEM, said("user", f"What is {n}?")) for n in range(12)]
    if gym is SFTGym:
        rows = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in rows]
    tokenizer = make_tokenizer(chat_template=TWO_ROLES)
    for _ in range(2 if kept else 1):  # the second time from what was kept
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gym(rows[:8], rows[8:], tokenizer, cache_dir=tmp_path if kept else None)
        (message,) = [str(warning.message) for warning in caught]
        assert f"train: 8 {LOST_SYSTEM}: rows 0, 1, 2, 3, 4, ...; test" not in message
        assert f"(train: 8 {LOST_SYSTEM}: rows 0, 1, 2, 3, 4, .... test: 4 {LOST_SYSTEM}: rows 0, 1, 2, 3)" in message
        assert "set tokenizer.chat_template" in message
        assert "evollm inspect" in message


def test_what_is_kept_of_tokenisation_remembers_prompts_unlike_those_of_inference(tmp_path: Any) -> None:
    for _ in range(2):
        found = report_of(DEEPSEEK_R1, row(), row(), cache_dir=tmp_path)
        assert found.noted == {UNLIKE_INFERENCE: (2, (0, 1))}


def test_without_a_row_left_the_error_says_what_is_left_out() -> None:
    with pytest.raises(DataError, match=r"1 sides that the chat template writes alike \(without the reasoning_content"):
        report_of(CHATML, row(chosen=thinking("4", "two and two"), rejected=thinking("4", "a guess")))


def test_an_inspection_says_what_the_gym_does() -> None:
    rows = [row(SYSTEM, USER), row(), row(SYSTEM, chosen=said("assistant", "blue " * 99))]
    found = inspect_data(rows, make_tokenizer(chat_template=TWO_ROLES), max_context_length=90)
    assert found.report.noted == {LOST_SYSTEM: (1, (0,))}
    printed = io.StringIO()
    print_inspection(found, rich.console.Console(file=printed, width=80))
    assert f"Warning: 1 {LOST_SYSTEM}: row 0\n" in printed.getvalue()


def test_an_encoder_decoder_is_told_of_a_prompt_unlike_that_of_inference() -> None:
    assert [*report_of(DEEPSEEK_R1, row(), encoder_decoder=True).noted] == [UNLIKE_INFERENCE]
