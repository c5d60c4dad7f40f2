"""The stages that an update passes on its way from a client into the aggregate.

A new stage is a file beside this one, its settings in `config.stages`, and a line in `STAGES`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pfm_llm.base.errors import ConfigError, ContractError
from pfm_llm.protocol.stages.clip import Clip
from pfm_llm.protocol.stages.stage import StageContext, UpdateStage
from pfm_llm.protocol.types import Refusal, Tensors

STAGES: Mapping[str, Callable[..., UpdateStage]] = {"clip": Clip}
"""Name in ``federation.stages`` to the function that makes the stage from its settings."""


class Stages:
    """The stages of one federation. Client and server run the same ones.

    A client runs the stages in the order of the config. The server runs them in reverse order,
    because it must first undo or check the last stage of the client. On the aggregate the order is
    that of the config again.
    """

    def __init__(
        self, chosen: Iterable[tuple[str, Mapping[str, Any]]], seed: int, cohort_size: int
    ) -> None:
        """Make the stages.

        Args:
            chosen: Name (a key of `STAGES`) and settings of each stage; every name at most once.
            seed: The experiment's seed.
            cohort_size: Number of clients in a round.
        """
        self._stages = {name: STAGES[name](**settings) for name, settings in chosen}
        self._seed = seed
        self._cohort_size = cohort_size

    def check_masked(self) -> None:
        """Raise `ConfigError` if a stage has to see single updates, which masks hide."""
        for name, stage in self._stages.items():
            looks = getattr(type(stage), "on_server", None) is not UpdateStage.on_server
            if looks and not stage.works_masked:
                raise ConfigError(
                    f"federation.stages: {name} looks at single updates at the server, and "
                    "federation.masks hides them; leave one of the two out"
                )

    def on_client(self, delta: Tensors, client_id: str, round_number: int) -> Tensors:
        """Apply all stages to a client's update before it is sent."""
        context = self._context(round_number, client_id)
        for stage in self._stages.values():
            delta = stage.on_client(delta, context)
        return delta

    def on_server(
        self, delta: Tensors, client_id: str, round_number: int
    ) -> tuple[Tensors, dict[str, float]]:
        """Apply all stages to an arrived update; also returns the number that each stage noted.

        Raises:
            ContractError: A stage refuses the update.
        """
        context, noted = self._context(round_number, client_id), {}
        for name, stage in reversed(self._stages.items()):
            try:
                delta, figure = stage.on_server(delta, context)
            except ContractError as error:
                raise ContractError(str(error), Refusal.STAGE) from error
            if figure is not None:
                noted[name] = figure
        return delta, noted

    def on_aggregate(self, aggregate: Tensors, round_number: int) -> Tensors:
        """Apply all stages to the aggregate before the server's step."""
        for stage in self._stages.values():
            aggregate = stage.on_aggregate(aggregate, self._context(round_number))
        return aggregate

    def summary(self, noted: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
        """For each stage that noted a number, its figures of the round."""
        return {
            name: dict(stage.summary(noted[name]))
            for name, stage in self._stages.items()
            if noted.get(name)
        }

    def _context(self, round_number: int, client_id: str = "") -> StageContext:
        return StageContext(self._seed, round_number, self._cohort_size, client_id)
