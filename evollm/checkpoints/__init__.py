"""Checkpoints of agents and populations, and exports: complete or absent, and read without running code."""

from evollm.checkpoints.agent import AgentFolder, read_agent_folder, write_agent_folder
from evollm.checkpoints.atomic import only_writer, replace_folder
from evollm.checkpoints.export import save_llm_checkpoint, save_merged_model
from evollm.checkpoints.policy_archive import save_policy_archive
from evollm.checkpoints.population import Population, read_population, write_population
from evollm.checkpoints.steps import newest_population, prune_populations

__all__ = [
    "AgentFolder",
    "Population",
    "newest_population",
    "only_writer",
    "prune_populations",
    "read_agent_folder",
    "read_population",
    "replace_folder",
    "save_llm_checkpoint",
    "save_merged_model",
    "save_policy_archive",
    "write_agent_folder",
    "write_population",
]
