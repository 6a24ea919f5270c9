"""Study specs for tests that need a study's data and no search."""

from __future__ import annotations

from fintx.config.schema import BudgetConfig, DataConfig, ModelConfig, SplitConfig, StudyConfig, StudySpec, TaskConfig


def spec_of(data: DataConfig, task: TaskConfig, split: SplitConfig, context_length: int) -> StudySpec:
    """A study that asks for these data."""
    model = ModelConfig(context_length=context_length, patch_length=1, stride=1)
    name, budget = StudyConfig(name="data"), BudgetConfig(parameters=1000)
    return StudySpec(study=name, data=data, task=task, split=split, budget=budget, model=model)
