"""Few-shot training of the answers: each client learns from the few questions that it holds.

With one question per client, one local gradient and Adam at the server, a round is a step on pooled
examples, as in TALLRec (Bao et al. 2023, arXiv 2305.00447, section 3.2).
"""

from collections.abc import Mapping, Sequence

import torch

from pfm_llm.base import seeding
from pfm_llm.base.errors import DataError
from pfm_llm.client.histories import LocalWork
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import StepLosses, StepTrainer
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.history import NO_LABEL
from pfm_llm.likelihood.model import LikelihoodModel, QuestionBatch, collate_questions
from pfm_llm.likelihood.questions import QuestionRow
from pfm_llm.model.batches import Dropout
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import Group, Tensors, in_group


class QuestionTrainer(StepTrainer):
    """Trains clients on the cross-entropy of yes and no; see `LikelihoodModel.losses`.

    The trunk states of the examples are computed once and stay in memory.

    Args:
        config: The experiment.
        model: The likelihood model.
        examples: Per client id its rows of questions, each with an answer.
        store: The store of private states; nothing else receives them.
        contract: The tensors that an update may hold.

    Attributes:
        contract: As given.

    Raises:
        DataError: A question has no answer.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: LikelihoodModel,
        examples: Mapping[str, Sequence[QuestionRow]],
        store: PrivateStore,
        contract: UpdateContract,
    ) -> None:
        super().__init__(config, model.private, store, contract, model.device)
        for client_id, rows in examples.items():
            if any((row.liked == NO_LABEL).any() for row in rows):
                raise DataError(f"client {client_id!r} has an example without an answer")
        self.contract = contract
        self._model = model
        self._examples = examples
        flat = [row for rows in examples.values() for row in rows]
        states = iter(model.trunk_states(flat))
        self._states = {c: [next(states) for _ in rows] for c, rows in examples.items()}

    @property
    def client_ids(self) -> list[str]:
        """The clients that have examples."""
        return list(self._examples)

    @property
    def num_tokens(self) -> int:
        """How many tokens the examples have."""
        return sum(len(row.tokens) for rows in self._examples.values() for row in rows)

    def _num_examples(self, client_id: str) -> int:
        return sum(map(len, self._examples.get(client_id, ())))

    def _num_tokens(self, client_id: str, limit: int) -> int:
        rows = self._examples[client_id]
        return len(rows) * max(len(row.tokens) for row in rows)

    def _step_losses(self, chunk: Sequence[str], work: LocalWork, round_number: int) -> StepLosses:
        batch = self._batch(chunk)

        def losses(step: int, stacked: Tensors, parts: Parts) -> list[torch.Tensor]:
            dropout = self._dropout(chunk, f"{work.purpose}/questions/{step}", round_number)
            return self._model.losses(batch, stacked, parts, dropout)

        return losses

    def _batch(self, chunk: Sequence[str]) -> QuestionBatch:
        """All examples of some clients; they are few, so each step reads all of them."""
        return collate_questions(
            [self._examples[client_id] for client_id in chunk],
            [self._states[client_id] for client_id in chunk],
        )

    def _dropout(self, chunk: Sequence[str], purpose: str, round_number: int) -> Dropout | None:
        adapters, seed = self._config.adapters, self._config.seed
        shared, private = adapters.shared.dropout, adapters.private.dropout
        if not shared and not private:
            return None
        own = [seeding.generator(seed, purpose, round_number, client_id) for client_id in chunk]
        return Dropout(head=0.0, taste=0.0, shared=shared, private=private, generators=own)


def answer_table(table: ParameterTable, modules: Sequence[str]) -> ParameterTable:
    """The shared tensors that change answers: the shared LoRA, and bases of a private one.

    Args:
        table: All shared tensors of an experiment.
        modules: The adapted modules.
    """
    bases = {f"{Group.BASIS}.{module}.A" for module in modules}
    return ParameterTable(
        one for name, one in table.items() if in_group(name, Group.LORA) or name in bases
    )
