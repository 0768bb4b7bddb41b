"""Suppresses progress bars and log messages of other libraries."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

# The logger and the beginning of two messages of bitsandbytes. The first, on the import on a CPU with AVX512-BF16, says
# that a kernel was not found; the kernel is for packed weights, which have no gradient and which evollm does not use.
# The second is logged for every layer and pass over an 8-bit base in another dtype than float16.
KERNEL = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
CAST = ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")


@dataclass(frozen=True)
class _Without(logging.Filter):
    """Drops the messages with this beginning."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def hold_back(remark: tuple[str, str]) -> None:
    """Suppress one message of a logger, given as (logger, beginning)."""
    logger, beginning = remark
    # addFilter ignores a filter that equals an existing one.
    logging.getLogger(logger).addFilter(_Without(beginning))


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress bars and warnings of transformers and datasets inside the block.

    Bars of downloads from the hub remain, since these may take long. A verbosity that the user has set is kept.
    """
    from transformers.utils import logging as transformers_log  # noqa: PLC0415 - slow to import

    with ExitStack() as afterwards:
        verbosity = transformers_log.get_verbosity()
        if verbosity == logging.WARNING:
            afterwards.callback(transformers_log.set_verbosity, verbosity)
            transformers_log.set_verbosity_error()
        # The private attribute, since the public function disables the bars of downloads as well.
        log_module: Any = transformers_log
        afterwards.callback(setattr, log_module, "_tqdm_active", transformers_log.is_progress_bar_enabled())
        log_module._tqdm_active = False
        datasets = sys.modules.get("datasets")
        set_by_user = "HF_DATASETS_DISABLE_PROGRESS_BARS" in os.environ
        if datasets is not None and not set_by_user and not datasets.are_progress_bars_disabled():
            afterwards.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield
