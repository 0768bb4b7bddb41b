"""What lies where in a run folder."""

from __future__ import annotations

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LINEAGE = "lineage.jsonl"
TIMING = "timing.jsonl"
EVALUATIONS = "evaluations"
FINAL = "final.safetensors"
CHECKPOINTS = "checkpoints"
ELITE = "elite"
# The keyword arguments of `tune`.
ASKED = "tune.json"

# What a run writes from its beginning to its end.
RUN_FILES = (CONFIG, METRICS, LINEAGE, TIMING, EVALUATIONS, FINAL, CHECKPOINTS, ELITE, ASKED)
