"""Other libraries at work for evollm: without bars and remarks that nobody asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_KERNEL_LOG = "bitsandbytes.backends.cpu.ops"


class _KernelRemark(logging.Filter):
    """Holds back one remark, once: that a kernel could not be fetched from the hub.

    bitsandbytes makes it when it is imported on a CPU with AVX512-BF16, which PEFT does wherever it is installed. The
    kernel multiplies packed weights, which have no gradient and which evollm never packs.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if "kernels-community" not in str(record.msg):
            return True
        logging.getLogger(_KERNEL_LOG).removeFilter(self)
        return False


def hold_kernel_remark_back() -> None:
    """Before PEFT is imported; whatever else the library says is heard."""
    if "bitsandbytes" not in sys.modules:
        logging.getLogger(_KERNEL_LOG).addFilter(_KernelRemark())


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
