"""The shapes in which people have their rows: data, which `evollm.data.columns` looks things up in.

A column has a role, such as `prompt`; that is also what the keys of a `columns` mapping are. Names are those of
LLaMA-Factory (alpaca, ShareGPT), TRL, UltraFeedback and PKU-SafeRLHF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

# For each meaning of a label the values that have it, as `value_of` writes them.
Values: TypeAlias = Mapping[str, tuple[str, ...]]

FIRST, SECOND, TIE = "first", "second", "tie"
GOOD, BAD = "good", "bad"
# A column of this name is an instruction to an assistant, and not a text that is to be continued.
INSTRUCTION = "instruction"
# Given with a prompt, whatever the rows are for.
_GIVEN: dict[str, tuple[str, ...]] = {
    "system": ("system",),
    "history": ("history",),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
_SCORED: dict[str, tuple[str, ...]] = {
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating", "rating_chosen", "chosen-rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating", "rating_rejected", "rejected-rating"),
}
_ANSWERS = {FIRST: "response_0", SECOND: "response_1"}
_BY_NUMBER: Values = {FIRST: ("0",), SECOND: ("1",), TIE: ("-1",)}


@dataclass(frozen=True)
class Shape:
    """Columns that mean something settled where they are together.

    Attributes:
        name: What it is called in the documentation.
        needs: For each role the column that must be there, unless the role is given by a mapping; "" where it can be
            given by a mapping alone.
        takes: For further roles the names of columns of which the first that is there is used.
        label: What the values of its label mean.
    """

    name: str
    needs: Mapping[str, str]
    takes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    label: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What a dataset is for.

    Attributes:
        shapes: The first that fits is taken.
        sides: The roles of what is learnt; the first of them is what a dataset lacks that has none of the shapes.
        meanings: What a label may mean.
    """

    shapes: tuple[Shape, ...]
    sides: tuple[str, ...]
    meanings: tuple[str, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """What the keys of a `columns` mapping may be."""
        found = dict.fromkeys(role for shape in self.shapes for role in (*shape.needs, *shape.takes))
        return tuple(role for role in found if role not in _NOT_MAPPED)

    @property
    def names(self) -> frozenset[str]:
        """The columns that any of its shapes reads."""
        needed = {name for shape in self.shapes for name in shape.needs.values() if name}
        return frozenset(needed.union(*(names for shape in self.shapes for names in shape.takes.values())))


# Roles that a column has by its name alone.
_NOT_MAPPED = frozenset({"conversation", "other_label", "repeated"})
_WITH_CONVERSATION = {"conversation": ("messages", "conversations")}
_ALPACA = {"input": ("input",)}
_SIDES = {"chosen": "chosen", "rejected": "rejected"}
_PROMPTS = {"prompt": ("prompt", INSTRUCTION), "input": ()}

PAIR = Kind(
    shapes=(
        Shape("columns: first, second, label", {FIRST: "", SECOND: "", "label": ""}, {**_PROMPTS, **_GIVEN}),
        Shape("pairs", {"prompt": "prompt", **_SIDES}, {"input": (), **_WITH_CONVERSATION, **_GIVEN, **_SCORED}),
        Shape(
            "alpaca pairs", {"prompt": INSTRUCTION, **_SIDES}, {**_ALPACA, **_WITH_CONVERSATION, **_GIVEN, **_SCORED}
        ),
        Shape("ShareGPT pairs", {"conversation": "conversations", **_SIDES}, {**_GIVEN, **_SCORED}),
        Shape("messages and sides", {"conversation": "messages", **_SIDES}, {**_GIVEN, **_SCORED}),
        Shape("sides alone", _SIDES, {**_GIVEN, **_SCORED}),
        Shape(
            "the better of two",
            {**_ANSWERS, "label": "better_response_id"},
            {**_PROMPTS, **_GIVEN, "other_label": ("safer_response_id",)},
            _BY_NUMBER,
        ),
        Shape(
            "SHP",
            {FIRST: "human_ref_A", SECOND: "human_ref_B", "label": "labels"},
            {"prompt": ("prompt", "history"), "system": ("system",)},
            {FIRST: ("1",), SECOND: ("0",)},
        ),
        Shape("the safer of two", {**_ANSWERS, "label": "safer_response_id"}, {**_PROMPTS, **_GIVEN}, _BY_NUMBER),
    ),
    sides=("chosen", "rejected"),
    meanings=(FIRST, SECOND, TIE),
)

_LABELLED = {"label": ("label",), **_GIVEN}
_GOOD_OR_BAD: Values = {GOOD: ("true", "1"), BAD: ("false", "0")}

EXAMPLE = Kind(
    shapes=(
        Shape(
            "completions", {"prompt": "prompt", "completion": "completion"}, {"input": (), **_LABELLED}, _GOOD_OR_BAD
        ),
        Shape("alpaca", {"prompt": INSTRUCTION, "completion": "output"}, {**_ALPACA, **_LABELLED}, _GOOD_OR_BAD),
        Shape("messages", {"messages": "messages"}, {"repeated": ("prompt",), **_LABELLED}, _GOOD_OR_BAD),
        Shape("ShareGPT", {"messages": "conversations"}, {"repeated": ("prompt",), **_LABELLED}, _GOOD_OR_BAD),
        Shape("text", {"text": "text"}, {"label": ("label",)}, _GOOD_OR_BAD),
    ),
    sides=("completion",),
    meanings=(GOOD, BAD),
)

# ------------------------------------------------------------------------------------------------ names that mean much

# Columns that say something to the model, by the role that their author probably meant: unused they would change what
# rows mean, and their meaning is not settled enough to be taken for granted.
MEANT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "prompt": (
            "question",
            "instruction",
            "query",
            "prompts",
            "problem",
            "user_prompt",
            "input",
            "context",
            "post",
            "history",
        ),
        "input": (
            "input",
            "context",
            "passage",
            "document",
            "background",
            "article",
            "inputs",
            "evidence",
            "initial_reason_steps",
            "documents",
            "choices",
            "options",
            "knowledge",
        ),
        "system": ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt", "persona"),
        "history": ("history", "chat_history", "dialogue_history", "dialog_history", "conversation_history"),
        "tools": ("tools", "functions", "available_tools"),
    }
)
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "trajectory")
LABELS = ("label", "labels", "preference", "overall_preference", "preferred", "winner", "better", "better_response_id")
OTHER_LABELS = ("safer_response_id", "annotator", "annotator1", "annotator_1", "annotation", "choice", "vote")
IMAGES = ("image", "images", "videos", "video", "audio", "audios")
# What sides are called elsewhere: for the line that a message spells out.
ANSWERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chosen": (
            "accepted",
            "preferred",
            "positive",
            "better",
            "good",
            "win",
            "response_chosen",
            "chosen_response",
            "response_j",
        ),
        "rejected": (
            "dispreferred",
            "negative",
            "worse",
            "bad",
            "lose",
            "response_rejected",
            "rejected_response",
            "response_k",
        ),
        "completion": ("output", "response", "answer", "target", "solution", "reply", "outputs", "responses"),
    }
)
# Columns of examples that say whether a completion is a good one, and are no label by their name alone.
GOODNESS = (
    *("labels", "kto_tag", "desirable", "is_desirable", "preferred", "is_preferred", "is_good", "good", "is_chosen"),
    *("if_chosen", "is_safe", "accepted", "is_accepted", "thumbs_up", "binary_label", "is_correct"),
)
# Columns with lists of answers to one prompt, as in UltraFeedback, Nectar and stack-exchange-preferences.
SEVERAL = ("completions", "answers", "responses", "generations", "candidates", "summaries", "replies")
