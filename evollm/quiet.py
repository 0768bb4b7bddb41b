"""Other libraries at work for evollm: without bars and remarks that nobody asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

# By logger, how a remark of bitsandbytes begins. When PEFT imports it on a CPU with AVX512-BF16, it says that it could
# not fetch a kernel, which is for packed weights: those have no gradient, and evollm never packs. The other comes for
# every layer of each pass over an 8-bit base in another type than float16.
KERNEL = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
CAST = ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")


@dataclass(frozen=True)
class _Without(logging.Filter):
    """Lets everything pass but one remark."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def hold_back(remark: tuple[str, str]) -> None:
    """Have one remark not shown; whatever else that logger says is."""
    logger, beginning = remark
    # One that is equal is not added again.
    logging.getLogger(logger).addFilter(_Without(beginning))


@contextmanager
def quiet() -> Iterator[None]:
    """Have transformers and datasets load and save without bars and remarks; afterwards they are as before.

    Bars of a download from the hub stay, for it may take long. So does a verbosity that the user has set.
    """
    from transformers.utils import logging as transformers_log  # noqa: PLC0415 - slow to import

    with ExitStack() as afterwards:
        verbosity = transformers_log.get_verbosity()
        if verbosity == logging.WARNING:
            afterwards.callback(transformers_log.set_verbosity, verbosity)
            transformers_log.set_verbosity_error()
        # Its public switch turns the bars of downloads off as well.
        of_log: Any = transformers_log
        afterwards.callback(setattr, of_log, "_tqdm_active", transformers_log.is_progress_bar_enabled())
        of_log._tqdm_active = False
        datasets = sys.modules.get("datasets")
        set_by_user = "HF_DATASETS_DISABLE_PROGRESS_BARS" in os.environ
        if datasets is not None and not set_by_user and not datasets.are_progress_bars_disabled():
            afterwards.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield
