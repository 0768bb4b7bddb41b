"""Tables of the column names of known dataset formats, which `evollm.data.columns` looks columns up in.

A column has a role, such as `prompt`; the keys of a `columns` argument are roles too. The formats are those of
LLaMA-Factory (alpaca, ShareGPT), TRL, UltraFeedback, SHP and PKU-SafeRLHF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

# For each meaning of a label the values that have it, as `evollm.data.columns.value_of` writes them.
Values: TypeAlias = Mapping[str, tuple[str, ...]]

FIRST, SECOND, TIE = "first", "second", "tie"
GOOD, BAD = "good", "bad"
# A column of this name holds a user's turn for a chat model, not a text to continue.
INSTRUCTION = "instruction"
# Optional columns beside the prompt, of pairs and of completions.
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
    """A known dataset format: columns that have these roles when they occur together.

    Attributes:
        name: Its name in the documentation.
        needs: For each required role its column, unless the user gives another; "" where the user must give it.
        takes: For each optional role the columns that may have it, the first one that exists first.
        label: What the values of its label mean.
    """

    name: str
    needs: Mapping[str, str]
    takes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    label: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What a dataset is for: pairs, single completions, completions with labels, or prompts alone.

    Attributes:
        shapes: The formats in which it may come; the first one that matches is taken.
        sides: The roles of the columns that are learnt.
        meanings: What a label may mean.
        keeps_others: Whether rows keep the columns that have no role.
    """

    shapes: tuple[Shape, ...]
    sides: tuple[str, ...]
    meanings: tuple[str, ...]
    keeps_others: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the `columns` argument may give."""
        found = dict.fromkeys(role for shape in self.shapes for role in (*shape.needs, *shape.takes))
        return tuple(role for role in found if role not in _NOT_MAPPED)

    @property
    def names(self) -> frozenset[str]:
        """The columns that at least one shape reads."""
        needed = {name for shape in self.shapes for name in shape.needs.values() if name}
        return frozenset(needed.union(*(names for shape in self.shapes for names in shape.takes.values())))


# Roles that the `columns` argument cannot give.
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

# Rows with a label, or pairs, of which each side is a row with a label.
UNPAIRED = Kind(
    shapes=(
        *(
            Shape(
                f"labelled {shape.name}",
                {**shape.needs, "label": "label"},
                {role: names for role, names in shape.takes.items() if role != "label"},
                shape.label,
            )
            for shape in EXAMPLE.shapes
            if shape.name != "text"
        ),
        *(shape for shape in PAIR.shapes if _SIDES.items() <= shape.needs.items()),
    ),
    sides=("completion",),
    meanings=(GOOD, BAD),
)

# Prompts that are still to be answered; what scores the answers may need any other column.
PROMPT = Kind(
    shapes=(
        Shape("prompts", {"prompt": "prompt"}, _GIVEN),
        Shape("instructions", {"prompt": INSTRUCTION}, {**_ALPACA, **_GIVEN}),
    ),
    sides=(),
    meanings=(),
    keeps_others=True,
)

# --------------------------------------------------------------------------- other names, for messages about columns

# Columns that probably hold a part of the model's input, by their probable role. A dataset in which one is unused is
# refused: the rows would mean something else without it, and its name alone does not settle its role.
INPUT_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "prompt": (
            *("question", "instruction", "query", "prompts", "problem"),
            *("user_prompt", "input", "context", "post", "history"),
        ),
        "input": (
            *("input", "context", "passage", "document", "background", "article", "inputs"),
            *("evidence", "initial_reason_steps", "documents", "choices", "options", "knowledge"),
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
# Other names of the sides, which messages suggest to map.
SIDE_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chosen": (
            *("accepted", "preferred", "positive", "better", "good"),
            *("win", "response_chosen", "chosen_response", "response_j"),
        ),
        "rejected": (
            *("dispreferred", "negative", "worse", "bad"),
            *("lose", "response_rejected", "rejected_response", "response_k"),
        ),
        "completion": ("output", "response", "answer", "target", "solution", "reply", "outputs", "responses"),
    }
)
# Columns that probably say whether a completion is a good one; only `label` is read without a mapping.
GOOD_OR_BAD_NAMES = (
    *("labels", "kto_tag", "desirable", "is_desirable", "preferred", "is_preferred", "is_good", "good", "is_chosen"),
    *("if_chosen", "is_safe", "accepted", "is_accepted", "thumbs_up", "binary_label", "is_correct"),
)
# Columns with lists of answers to one prompt, as in UltraFeedback, Nectar and stack-exchange-preferences.
LIST_NAMES = ("completions", "answers", "responses", "generations", "candidates", "summaries", "replies")
