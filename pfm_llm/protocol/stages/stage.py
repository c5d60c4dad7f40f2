"""What a stage of an update is: a protocol that client and server both run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pfm_llm.protocol.types import Tensors


@dataclass(frozen=True)
class StageContext:
    """What a stage may know beside the tensors.

    Attributes:
        seed: The experiment's seed. It is public: no secret may come from it.
        round_number: The round under way, from 1.
        cohort_size: How many clients were asked in this round, whoever answers.
        client_id: Whose update it is; empty for the aggregate.
    """

    seed: int
    round_number: int
    cohort_size: int
    client_id: str = ""


class UpdateStage(Protocol):
    """Something that is done to every update on its way; each hook is optional.

    A stage has no state that outlives a call: a resumed run has the context and nothing else.
    Every hook returns new tensors of the same names, shapes and dtypes, and leaves its arguments
    as they are.
    """

    def on_client(self, delta: Tensors, context: StageContext) -> Tensors:
        """Change an update at its client, before the message is built.

        Args:
            delta: New minus received value of each shared tensor; may be not finite.
            context: Round and client.
        """
        return delta

    def on_server(self, delta: Tensors, context: StageContext) -> tuple[Tensors, float | None]:
        """Change an update at the server, which does not trust that the client did its part.

        Args:
            delta: What arrived; fits the contract and is finite.
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
            aggregate: What the aggregator made of the round's updates, float32.
            context: Round and size of the cohort.
        """
        return aggregate

    def summary(self, noted: Sequence[float]) -> Mapping[str, float]:
        """Figures for the round's record.

        Args:
            noted: What `on_server` noted of each update, at least one number.
        """
        return {}
