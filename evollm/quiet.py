"""Other libraries at work for evollm: without bars and remarks that nobody asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Before PEFT is imported; everything else that the library says is heard."""
    logging.getLogger(_KERNEL_LOG).addFilter(_KernelRemark())


@contextmanager
def quiet() -> Iterator[None]:
    """Have transformers and datasets load and save without bars and remarks; afterwards they are as before.

    Bars of a download stay, for it may take long. A verbosity that the user has set stays likewise.
    """
    # Slow to import, and not needed by whoever only reads files.
    import datasets  # noqa: PLC0415
    from huggingface_hub import utils as hub  # noqa: PLC0415
    from transformers.utils import logging as of_transformers  # noqa: PLC0415

    verbosity, bars = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    try:
        if verbosity == logging.WARNING:
            of_transformers.set_verbosity_error()
        of_transformers.disable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        if bars:
            of_transformers.enable_progress_bar()
            if not hub_bars:
                hub.disable_progress_bars()
