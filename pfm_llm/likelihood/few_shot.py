"""Few-shot training: which examples the clients hold, and the rounds of a federation on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.base.processes import Processes
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settle import known
from pfm_llm.data.history import Query
from pfm_llm.data.interactions import Interactions
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.likelihood.questions import QuestionRow
from pfm_llm.likelihood.scorer import LikelihoodScorer
from pfm_llm.likelihood.trainer import QuestionTrainer, answer_table
from pfm_llm.model.build import ModelParts
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import SharedState
from pfm_llm.server.server import Server

SHOWN_BEFORE = 10
"""Events of a history that come before the first question of an example, at least."""


def draw_examples(
    train: Interactions, threshold: float, shots: int, per_client: int, seed: int
) -> list[Query]:
    """Draw examples for few-shot training, each of another user.

    An example is a user's history up to a random event, and the items that the user rated next.
    The examples of fewer shots are the first of those of more.

    Args:
        train: The training interactions; nothing else is drawn from.
        threshold: A rating of at least this is a like.
        shots: Number of questions over all examples.
        per_client: Questions of an example; ``shots`` is a multiple of it.
        seed: The seed of the draws.

    Raises:
        ConfigError: ``shots`` is no multiple of ``per_client``.
        DataError: Too few users have a history that is long enough.
    """
    if shots % per_client:
        raise ConfigError(f"{shots} shots are no multiple of {per_client} for each client")
    random = numpy_generator(seed, "likelihood/examples")
    found: list[Query] = []
    for user in random.permutation(train.num_users).tolist():
        if len(found) == shots // per_client:
            return found
        last = len(train.history(user)) - per_client
        if last >= SHOWN_BEFORE:
            start = int(random.integers(SHOWN_BEFORE, last + 1))
            found.append(_query(train, user, threshold, slice(start, start + per_client)))
    if len(found) == shots // per_client:
        return found
    raise DataError(
        f"{len(found)} users have {SHOWN_BEFORE + per_client} training events, and {shots} shots "
        f"need {shots // per_client}; lower the number of shots"
    )


def newest_questions(train: Interactions, user: int, threshold: float, count: int) -> Query:
    """The newest training events of a user as questions after the events before them.

    Raises:
        DataError: The user has too few training events.
    """
    size = len(train.history(user))
    if size <= count:
        raise DataError(f"user {user} has {size} training events, {count} questions need more")
    return _query(train, user, threshold, slice(size - count, size))


def _query(train: Interactions, user: int, threshold: float, asked: slice) -> Query:
    history = train.history_of(user).labelled(threshold)
    if history.liked is None:
        raise DataError("likes need ratings and the source has none; set data.columns.rating")
    return Query(user, history[: asked.start], history.items[asked], history.liked[asked])


@dataclass(frozen=True)
class FewShotTask:
    """A federation whose clients hold few examples.

    Attributes:
        config: The experiment, with ``federation.cohort_size`` and ``num_rounds``.
        parts: The model over the catalogue.
        scorer: The likelihood scorer, on the same language model.
        store: The clients' private folders.
        processes: The processes that share a cohort.
    """

    config: ExperimentConfig
    parts: ModelParts
    scorer: LikelihoodScorer
    store: PrivateStore
    processes: Processes

    def trainer(self, examples: Mapping[str, Sequence[QuestionRow]]) -> QuestionTrainer:
        """Local training of clients on their examples."""
        contract = self._table.contract(
            backbone_hash=self.parts.backbone.weights_hash,
            prompt_hash=self.scorer.encoder.prompt_hash,
            catalogue_hash=self.parts.contract.catalogue_hash,
        )
        return QuestionTrainer(self.config, self.scorer.model, examples, self.store, contract)

    def rounds(
        self, trainer: QuestionTrainer, client_ids: Sequence[str] | None = None
    ) -> Iterator[SharedState]:
        """Train, round by round.

        Args:
            trainer: From `trainer`.
            client_ids: The clients that take part; None: all that have examples.

        Yields:
            The shared state after each round.

        Raises:
            TrainingError: A step led to values that are not finite.
        """
        federation = self.config.federation
        server = Server(
            self._table,
            trainer.contract,
            trainer.client_ids if client_ids is None else client_ids,
            federation,
            self.config.seed,
        )
        exchange = LocalExchange(server, trainer, self.store, self.processes)
        for round_number in range(1, known(federation.num_rounds) + 1):
            cohort = server.select_cohort(round_number)
            server.aggregate(exchange.train(cohort, server.broadcast))
            yield server.shared

    def initial(self) -> SharedState:
        """The shared state before training: it leaves every answer as it is."""
        return self._table.initial_state()

    @property
    def _table(self) -> ParameterTable:
        return answer_table(self.parts.table, list(self.parts.adapter.modules))
