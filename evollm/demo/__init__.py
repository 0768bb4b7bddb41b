"""The embedded demo: a real model from the package index, and preference pairs that evollm ships."""

from evollm.demo.model import demo_model
from evollm.demo.run import demo_pairs, run_demo

__all__ = ["demo_model", "demo_pairs", "run_demo"]
