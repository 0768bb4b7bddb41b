"""An agent's settings and hyperparameters, and the learning rate that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from evollm.algorithms.optimizers import set_learning_rate
from evollm.algorithms.settings import AgentSettings, Evolvable, Hyperparameters, Setting
from evollm.checks import optional_whole_number
from evollm.errors import ConfigurationError


class ConfiguredAgent:
    """Each setting and each hyperparameter as an attribute, and the schedule of the learning rate.

    Attributes:
        steps: Number of batches that the agent has learnt from.
        schedule_start: Value of `steps` at which the schedule of the learning rate began.
    """

    settings: AgentSettings
    hyperparameters: Hyperparameters
    optimizer: torch.optim.Optimizer
    index: int
    steps: int

    lr = Evolvable[float]()
    max_grad_norm = Evolvable[float]()
    batch_size = Evolvable[int]()
    update_epochs = Evolvable[int]()
    seed = Setting[int]()
    micro_batch_size_per_gpu = Setting["int | None"]()
    gradient_checkpointing = Setting["bool | None"]()
    calc_position_embeddings = Setting[bool]()
    pad_token_id = Setting["int | None"]()
    pad_token = Setting["str | None"]()
    torch_compiler = Setting["str | None"]()
    token_budget = Setting["int | None"]()
    drop_nonfinite_rows = Setting[bool]()
    lr_scheduler_type = Setting[str]()
    lr_scheduler_kwargs = Setting["Mapping[str, Any] | None"]()
    warmup_ratio = Setting[float]()
    warmup_steps = Setting[float]()
    optim = Setting[str]()
    weight_decay = Setting[float]()
    loraplus_lr_ratio = Setting["float | None"]()
    _num_training_steps: int | None = None
    schedule_start = 0

    def hyperparameter_values(self) -> dict[str, float]:
        """The hyperparameters by name."""
        return asdict(self.hyperparameters)

    def set_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Change hyperparameters. The optimizer gets the learning rate and keeps its moments.

        Raises:
            ConfigurationError: A name is unknown or a value invalid.
        """
        hyperparameters = self.check_hyperparameters(values)
        if hyperparameters is self.hyperparameters:
            return
        self.hyperparameters = hyperparameters
        self._set_rate()

    def check_hyperparameters(self, values: Mapping[str, Any]) -> Hyperparameters:
        """The agent's hyperparameters with these values, checked; the agent is not changed.

        Raises:
            ConfigurationError: A name is unknown or a value invalid.
        """
        changed = self.hyperparameters.with_values(values)
        if changed is not self.hyperparameters:
            self.settings.check(changed)
        return changed

    @property
    def num_training_steps(self) -> int | None:
        """Number of batches that the schedule of the learning rate is over; None: not known.

        A run sets it. Setting it begins the schedule, at step 0 of `num_training_steps`.
        """
        return self._num_training_steps

    @num_training_steps.setter
    def num_training_steps(self, value: int | None) -> None:
        self._num_training_steps = optional_whole_number("num_training_steps", value, 1)
        self.schedule_start = self.steps
        self._set_rate()

    @property
    def lr_factor(self) -> float:
        """Factor of the schedule for the next batch."""
        if self.settings.depends_on_total and self.num_training_steps is None:
            return 1.0
        return self.settings.factor(self.lr, self.steps - self.schedule_start, self.num_training_steps)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next batch: `lr` times the factor of the schedule."""
        return self.lr * self.lr_factor

    def _set_rate(self) -> None:
        set_learning_rate(self.optimizer, self.lr, self.lr_factor)

    def check_schedule(self) -> None:
        """Check that the schedule of the learning rate has a next step.

        Raises:
            ConfigurationError: The schedule has ended, or `num_training_steps` is not known and needed.
        """
        total = self.num_training_steps
        if self.settings.depends_on_total and (total is None or self.steps - self.schedule_start >= total):
            ended = "" if total is None else ", whose schedule has ended"
            fix = f"of agent {self.index}{ended}: lr_scheduler_type={self.lr_scheduler_type!r} depends on the number "
            fix += "of steps, which a run sets; for learn without a run set agent.num_training_steps to that of batches"
            raise ConfigurationError("num_training_steps", total, fix)

    def count_step(self) -> None:
        """Count a batch, and set the learning rate of the next one."""
        self.steps += 1
        # A constant rate is left to a scheduler that a script may have put on the optimizer.
        if not self.settings.is_constant:
            self._set_rate()
