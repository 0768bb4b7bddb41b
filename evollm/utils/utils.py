"""`save_llm_checkpoint`, under the path that the scripts of other libraries import it from."""

from evollm.checkpoints import save_llm_checkpoint

__all__ = ["save_llm_checkpoint"]
