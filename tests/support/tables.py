"""Shared tensors from settings alone, and tables of made-up ones; no language model is needed."""

from collections.abc import Iterable
from typing import Any

import torch

from pfm_llm.config.choices import Task
from pfm_llm.config.model import AdaptersConfig, HeadConfig, TasteConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.protocol.parameters import Parameter, ParameterTable
from pfm_llm.protocol.types import Tensors

Drawn = dict[str, torch.Tensor]


def config_of(
    head: HeadConfig | None = None,
    adapters: AdaptersConfig | None = None,
    taste: TasteConfig | None = None,
    tasks: tuple[Task, ...] = (Task.NEXT_ITEM,),
    **settings: Any,
) -> ExperimentConfig:
    """A config of which only that matters which shared tensors follow from.

    Args:
        head: The head; None: the default.
        adapters: The adapters; None: the default, or a private taste.
        taste: Settings of a private taste.
        tasks: What is predicted.
        **settings: Other sections or keys, such as ``seed``.
    """
    if adapters is None:
        kind = "independent" if taste is None else "taste"
        private = {"kind": kind, "taste": taste or TasteConfig()}
        adapters = AdaptersConfig.model_validate({"private": private})
    return ExperimentConfig.model_validate(
        {
            "name": "tensors",
            "tasks": tasks,
            "data": {"split": "last_fraction"},
            "head": head or HeadConfig(),
            "adapters": adapters,
            "federation": {"local": {"schedule": "alternate"}},
            **settings,
        }
    )


def drawn(parameters: Iterable[Parameter]) -> Drawn:
    """The tensors before training."""
    return {parameter.name: parameter.initial() for parameter in parameters}


def table_of(tensors: Tensors) -> ParameterTable:
    """A table whose initial tensors these are; all are sent, at a learning rate of 1."""
    return ParameterTable(
        Parameter(name, tuple(value.shape), 1.0, value.clone) for name, value in tensors.items()
    )
