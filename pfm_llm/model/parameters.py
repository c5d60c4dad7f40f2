"""The shared tensors of an experiment. They are known without loading the language model."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from pfm_llm.config.choices import ServerOptimizer
from pfm_llm.config.methods import SPECS
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.ablation import is_trained
from pfm_llm.model.head import head_parameters
from pfm_llm.model.items.codes import coded, num_vectors
from pfm_llm.model.new_items import new_item_parameters
from pfm_llm.model.private import make_private_part
from pfm_llm.model.private.lora import random_a
from pfm_llm.protocol.parameters import Parameter, ParameterTable, Sizes
from pfm_llm.protocol.types import lora_name


def parameter_table(config: ExperimentConfig, sizes: Sizes) -> ParameterTable:
    """Collect the tensors that the parts of the model declare.

    Args:
        config: Adapters, head, tasks, seed, learning rates, and the method, which decides what is
            sent.
        sizes: The sizes of the language model and of the catalogue.

    Raises:
        ConfigError: ``head.dim`` exceeds the hidden size.
    """
    codes = config.head.codes
    # Where items share vectors, tensors with a row for each item have one for each vector.
    sizes = sizes if codes is None else replace(sizes, num_items=num_vectors(codes))
    parameters: list[Parameter] = [*_shared_lora(config, sizes), *head_parameters(config, sizes)]
    parameters += new_item_parameters(config)
    parameters += make_private_part(config, sizes).shared_parameters()
    if codes is not None:
        parameters = [coded(one, codes) if one.per_item else one for one in parameters]
    trains, server = SPECS[config.method].trains, config.federation.server
    parameters = [
        replace(one, sent=trains(one.name) and is_trained(config, one.name)) for one in parameters
    ]
    if server.optimizer is ServerOptimizer.AVERAGE:
        parameters = [replace(one, rate=server.lr_scale) for one in parameters]
    return ParameterTable(parameters, config.federation.transport)


def _shared_lora(config: ExperimentConfig, sizes: Sizes) -> Iterator[Parameter]:
    rank, server = config.adapters.shared.rank, config.federation.server
    rate = server.lr_lora * server.lr_scale
    for module, (fan_in, fan_out) in sizes.modules.items():
        a = partial(random_a, rank, fan_in, config.seed, f"shared/{module}")
        yield Parameter(lora_name(module, "A"), (rank, fan_in), rate, a)
        yield Parameter(lora_name(module, "B"), (fan_out, rank), rate)
