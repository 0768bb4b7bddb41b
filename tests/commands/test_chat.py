"""Chat and exports know in which form the run's rows were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_runs import MESSAGES, ROWS, train
from tokenizers_for_tests import CHATML, make_tokenizer
from transformers import AutoTokenizer

from evollm import ConfigurationError, PreferenceGym
from evollm.cli import main
from evollm.commands import chat
from evollm.tuning import winner as winners
from evollm.tuning.conversation import Conversation
from evollm.tuning.winner import open_winner


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the base and the winner are given, in turns."""
    given, answer = [], winners.greedy_answers

    def greedy_answers(base, adapters, prompts, tokenizer, max_new_tokens):
        given.append(tokenizer.decode(prompts[0]))
        return answer(base, adapters, prompts, tokenizer, max_new_tokens)

    monkeypatch.setattr(winners, "greedy_answers", greedy_answers)
    return given


def type_in(monkeypatch, *lines: str, terminal: bool = False) -> None:
    monkeypatch.setattr("sys.stdin", iter([f"{line}\n" for line in lines]))
    monkeypatch.setattr(chat, "_is_terminal", lambda: terminal)


def talked(*turns: tuple[str, str]) -> str:
    """Turns as the template writes them, before an answer."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def test_lines_are_turns_of_a_conversation_where_the_rows_were_messages(workplace, asked, monkeypatch, capsys) -> None:
    assert train("run_dir=run") == 0
    replies = iter(["base 1", "winner 1", "base 2", "winner 2", "base 3", "winner 3"])
    answer = winners.greedy_answers
    monkeypatch.setattr(winners, "greedy_answers", lambda *args: (answer(*args), [[next(replies)]])[1])
    asked.clear()
    capsys.readouterr()
    type_in(monkeypatch, "first", "", "second", "/clear", "third", "/exit", "fourth")
    assert main(["chat", "run"]) == 0
    first = talked(("user", "first"))
    seconds = [talked(("user", "first"), ("assistant", f"{who} 1"), ("user", "second")) for who in ("base", "winner")]
    assert asked == [first, first, *seconds, *[talked(("user", "third"))] * 2]
    said = capsys.readouterr().out
    assert said.startswith("The run's rows were messages: prompts go through the chat template, and lines")
    assert all(text in said for text in ("base 2", "winner 2", "A new conversation."))
    assert "fourth" not in said


@pytest.mark.parametrize("how", [["--prompt", "first", "--prompt", "second"], ["--no-history"]])
def test_prompts_of_the_command_line_are_by_themselves(workplace, asked, monkeypatch, capsys, how) -> None:
    assert train("run_dir=run") == 0
    asked.clear()
    type_in(monkeypatch, "first", "second", "/quit")
    assert main(["chat", "run", "--max-new-tokens", "2", *how]) == 0
    assert asked == [talked(("user", text)) for text in ("first", "first", "second", "second")]
    assert "each is answered by itself" in capsys.readouterr().out


def test_a_run_on_strings_is_asked_with_strings_on_an_instruct_model_too(workplace, asked, monkeypatch, capsys) -> None:
    assert train("run_dir=run", data="strings.jsonl") == 0
    assert json.loads(Path("run/config.json").read_text())["data"]["form"] == "text"
    asked.clear()
    capsys.readouterr()
    type_in(monkeypatch, "first", "/clear", "second", terminal=True)
    assert main(["chat", "run", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("The run's rows were strings: prompts are continued as they are, and each is answered by")
    assert "There is nothing to clear" in said
    assert main(["chat", "run", "--max-new-tokens", "2", "--template", "--prompt", "third"]) == 0
    assert asked == ["first", "first", "second", "second", *[talked(("user", "third"))] * 2]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_has_the_ids_of_a_row(workplace, adds_bos) -> None:
    for data, rows in (("strings.jsonl", ROWS), ("messages.jsonl", MESSAGES)):
        # With a template that writes none.
        tokenizer = make_tokenizer(adds_bos=adds_bos, chat_template=CHATML)
        tokenizer.save_pretrained("model")
        assert train(f"run_dir={data}-{adds_bos}", data=data) == 0
        winner = open_winner(f"{data}-{adds_bos}")
        pair = PreferenceGym(rows[:1], None, tokenizer).train_pairs[0]
        prompt = rows[0]["prompt"]
        assert winner.prompt_ids(prompt).tolist() == pair.prompt_ids.tolist()
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        given = winner.answer(prompt, 3, tuned=True)
        talk = Conversation(winner, 3, uses_template=winner.uses_template, keeps=False)
        assert talk.ask(text).answers[1] == given


def test_what_does_not_fit_is_left_out_from_the_beginning_and_said(workplace, asked, monkeypatch, capsys) -> None:
    assert train("run_dir=run") == 0
    winner = open_winner("run")
    talk = Conversation(winner, 8, uses_template=True, keeps=True)
    forgotten = [talk.ask(f"{number} " + "yes " * 40).forgotten for number in range(6)]
    assert forgotten[0] == 0
    assert any(forgotten)
    limit = winner.agent.base.max_positions
    assert all(len(winner.tokenizer(text)["input_ids"]) + 8 <= limit for text in asked)
    assert "<|im_start|>user\n5 yes" in asked[-1]
    with pytest.raises(ConfigurationError, match="the base takes 256: ask something shorter"):
        talk.ask("yes " * 400)
    # Somebody who types asks something else.
    type_in(monkeypatch, "yes " * 400, "no", terminal=True)
    capsys.readouterr()
    assert main(["chat", "run", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert "evollm: prompt=" in said.out
    assert said.err == ""
    type_in(monkeypatch, "yes " * 400)
    assert main(["chat", "run"]) == 1


def test_a_run_of_before_that_does_not_say_its_form_goes_through_the_template_and_on(workplace, asked, capsys) -> None:
    assert train("run_dir=run", "checkpoint_steps=1") == 0
    path = Path("run/config.json")
    config = json.loads(path.read_text())
    del config["data"]["form"]
    path.write_text(json.dumps(config))
    asked.clear()
    capsys.readouterr()
    assert main(["chat", "run", "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert asked == [talked(("user", "a"))] * 2
    assert "The run does not say what its rows were" in capsys.readouterr().out
    assert main(["resume", "run", "num_epochs=2"]) == 0


# ---------------------------------------------------------------------------------------------------------- model cards


def code_of(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("data", ["messages.jsonl", "strings.jsonl"])
@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_a_card_names_the_base_and_its_lines_work(workplace, asked, monkeypatch, capsys, data, what) -> None:
    assert train("run_dir=run", data=data) == 0
    to = 'my "model"'
    assert main(["export", "run", "--to", to, "--what", what]) == 0
    card = Path(to, "README.md")
    text = card.read_text()
    assert f"Base: `{workplace / 'model'}`. Tuned with" in text
    assert "base_model:" not in text
    assert f"library_name: {'peft' if what == 'adapter' else 'transformers'}\n" in text
    asked.clear()
    winner = open_winner("run")
    messages = [{"role": "user", "content": "What is tea?"}]
    expected = winner.answer(messages if data == "messages.jsonl" else "What is tea?", 64, tuned=True)
    capsys.readouterr()
    exec(code_of(card), {})
    assert capsys.readouterr().out.strip() == expected


def test_a_card_of_a_base_from_the_hub_has_its_name_as_metadata(workplace, monkeypatch) -> None:
    assert train("run_dir=run") == 0
    winner = open_winner("run")
    monkeypatch.setattr(type(winner.agent.base), "name", "org/some-model")
    winners.save_merged_model(winner.agent, "out", AutoTokenizer.from_pretrained("model"), "run")
    winners.save_llm_checkpoint(winner.agent, "adapter", None, "run")
    for folder in ("out", "adapter"):
        text = Path(folder, "README.md").read_text()
        assert text.startswith("---\nbase_model: org/some-model\n")
        assert "Base: [org/some-model](https://huggingface.co/org/some-model)." in text
    assert 'from_pretrained("org/some-model")' in code_of(Path("adapter/README.md"))
