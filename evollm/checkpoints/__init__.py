"""State on disk: never half there, and never code."""

from evollm.checkpoints.agent import AgentFolder, read_agent_folder, save_llm_checkpoint, write_agent_folder
from evollm.checkpoints.files import replace_folder

__all__ = ["AgentFolder", "read_agent_folder", "replace_folder", "save_llm_checkpoint", "write_agent_folder"]
