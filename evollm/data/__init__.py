"""From what a user passes as a dataset to token ids.

1. `open_dataset` opens files and datasets of the Hub, `containers` iterates over any container of rows, and
   `rows.read_rows` keys these by role.
2. `columns` gives each column a role, such as `chosen`: by the user's `columns=`, else by `shapes`, the tables of known
   formats. A dataset that matches none is refused, and `column_hints` says what to do.
3. `preference_rows` or `completion_rows` makes each row a `TextPair` or a `ChatPair` (`pairs`): `prompts` reads the
   context, `cells` the value of a single cell. A row that cannot be used is dropped, with a reason.
4. `chat_template` renders a `ChatPair`, at the time that `clock` holds, and finds the assistant's turns;
   `template_check` looks for texts that the template has left out.
5. `tokenization` encodes text, adds BOS and EOS to strings, cuts long prompts and drops what does not fit;
   `token_cache` keeps the ids between runs.
6. `row_report` counts what became of the rows, `split_warnings` says what is odd between splits, and `digests` what has
   changed since a run began.

`loading.load_pairs` does all of it, for one split.
"""

from __future__ import annotations

from evollm.data.completion_rows import read_examples
from evollm.data.loading import load_pairs
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.preference_rows import read_pairs
from evollm.data.row_report import DataReport
from evollm.data.samples import Batch, Completion, Sample
from evollm.data.tokenization import tokenize_pairs

__all__ = [
    "Batch",
    "ChatPair",
    "Completion",
    "DataReport",
    "Sample",
    "TextPair",
    "load_pairs",
    "read_examples",
    "read_pairs",
    "tokenize_pairs",
]
