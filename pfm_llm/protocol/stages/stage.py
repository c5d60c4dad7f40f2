"""The protocol of an update stage, which client and server both run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from pfm_llm.protocol.types import Tensors


@dataclass(frozen=True)
class StageContext:
    """The inputs of a stage besides the tensors.

    Attributes:
        seed: The experiment's seed. It is public: no secret may be derived from it.
        round_number: The current round, from 1.
        cohort_size: Number of clients that were asked in this round, also those without an answer.
        client_id: The client of the update; empty for the aggregate.
    """

    seed: int
    round_number: int
    cohort_size: int
    client_id: str = ""


class UpdateStage(Protocol):
    """A change to every update between the client and the server's step. Each hook is optional.

    A stage keeps no state between calls, because a resumed run only has the context. Every hook
    returns new tensors with the same names, shapes and dtypes, and does not change its arguments.

    Attributes:
        works_masked: Whether the stage does without `on_server`, which sees no single update under
            ``federation.masks``. A stage without that hook does.
    """

    works_masked: ClassVar[bool] = False

    def on_client(self, delta: Tensors, context: StageContext) -> Tensors:
        """Change an update at its client, before the message is built.

        Args:
            delta: New minus received value of each shared tensor; may be not finite.
            context: Round and client.
        """
        return delta

    def on_server(self, delta: Tensors, context: StageContext) -> tuple[Tensors, float | None]:
        """Change an update at the server, which does not rely on the client's own stage.

        Args:
            delta: The update that arrived; it fits the contract and is finite.
            context: Round and client.

        Returns:
            The update to aggregate, and one number for `summary` (None: nothing to note).

        Raises:
            ContractError: The update is to be refused; the message names the client.
        """
        return delta, None

    def on_aggregate(self, aggregate: Tensors, context: StageContext) -> Tensors:
        """Change the aggregated update before the server's step, as noise would.

        Every process of a run calls this with the same aggregate and must get the same bits.

        Args:
            aggregate: The aggregated update of the round, float32.
            context: Round and size of the cohort.
        """
        return aggregate

    def summary(self, noted: Sequence[float]) -> Mapping[str, float]:
        """Figures for the round's record.

        Args:
            noted: The numbers that `on_server` noted, one or more.
        """
        return {}
