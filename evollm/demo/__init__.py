"""The embedded demo: a real model from the package index, and preference pairs that evollm ships."""

from evollm.demo.model import demo_model
from evollm.demo.run import demo_agents_and_env, demo_pairs, is_demo, resume_demo, run_demo

__all__ = ["demo_agents_and_env", "demo_model", "demo_pairs", "is_demo", "resume_demo", "run_demo"]
