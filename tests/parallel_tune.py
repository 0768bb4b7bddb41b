"""Call `tune` in however many processes this was launched with; what `tests/test_processes.py` runs.

torchrun --nproc_per_node 2 tests/parallel_tune.py FOLDER MAX_STEPS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import make_rows
from parallel_run import join, make_small_model
from quick_page import quick_page
from snapshots import actor_bits
from tokenizers_for_tests import make_tokenizer

from evollm import tune
from evollm.report import write


def main() -> None:
    """Tune, and let each process write what it was given."""
    write.render = quick_page
    folder, max_steps = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = join()
    result = tune(
        make_small_model(),
        make_rows(24),
        tokenizer=make_tokenizer(adds_bos=True),
        population=2,
        max_steps=max_steps,
        evo_steps=1,
        no_mutation=0.0,
        rl_hp=1.0,
        lora_config={"r": 2, "target_modules": ["q_proj"]},
        data_batch_size_per_gpu=2,
        num_sample_answers=0,
        verbose=False,
        # So that the first evaluation is the best.
        fitness=lambda evaluation: -evaluation.mean_margin,
        accelerator=accelerator,
        run_dir=folder,
    )
    report = result.report and result.report.name
    given = {
        "best": result.best.index,
        "steps": result.best.steps,
        "bits": actor_bits(result.best),
        "schedule": result.schedule,
        "report": report,
    }
    (folder / f"held-{accelerator.process_index}.json").write_text(json.dumps(given))


if __name__ == "__main__":
    main()
