"""Scoring and re-ranking some items by whether the language model says that the user likes them."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.history import Query
from pfm_llm.data.interactions import Catalogue
from pfm_llm.likelihood.model import LikelihoodModel, collate_questions
from pfm_llm.likelihood.questions import QuestionEncoder, QuestionRow, QuestionSettings
from pfm_llm.model.batches import stacked_tensors
from pfm_llm.model.build import ModelParts
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import Mode, SharedState, Tensors
from pfm_llm.text.questions import load_question

_TOKENS_AT_ONCE = 8192
"""Padded tokens of users whose questions are read together."""


class AskedQuestions:
    """Queries as rows of questions, with the states below the adapted layers.

    These states depend on neither adapter, so they serve many shared and private states.

    Args:
        model: The likelihood model.
        encoder: Renders questions.
        queries: The questions about each query's targets.

    Attributes:
        num_tokens: How many tokens were read for them.
    """

    def __init__(
        self, model: LikelihoodModel, encoder: QuestionEncoder, queries: Sequence[Query]
    ) -> None:
        self.rows: list[list[QuestionRow]] = [encoder.rows(query) for query in queries]
        flat = [row for own in self.rows for row in own]
        states = iter(model.trunk_states(flat))
        self.states = [[next(states) for _ in own] for own in self.rows]
        self.num_tokens = sum(len(row.tokens) for row in flat)

    def __len__(self) -> int:
        return len(self.rows)


class LikelihoodScorer:
    """Scores items by the log-odds that the user likes them, in the words of the language model.

    Beside `evaluation.scorer.Scorer` it is the second scorer. A pass reads the text of each item
    in question after the history, so that it serves short lists and no catalogue.

    Args:
        model: The likelihood model.
        encoder: Renders questions.

    Attributes:
        model: As given.
        encoder: As given.
    """

    def __init__(self, model: LikelihoodModel, encoder: QuestionEncoder) -> None:
        self.model = model
        self.encoder = encoder

    @classmethod
    def of(
        cls,
        config: ExperimentConfig,
        parts: ModelParts,
        catalogue: Catalogue,
        settings: QuestionSettings,
    ) -> Self:
        """The likelihood scorer on the language model and the adapters of a model.

        Args:
            config: The number of adapted layers.
            parts: The model.
            catalogue: Its items.
            settings: What is read.

        Raises:
            ConfigError: There is no such prompt, or an answer is not a single token.
            DataError: The catalogue lacks a field of the prompt, or a question may be too long.
            BackboneError: The language model cannot answer questions.
        """
        backbone, prompt = parts.backbone, load_question(settings.prompt)
        # A row shows a question the whole history: a layer with a sliding window must see it too.
        window = getattr(backbone.model.config.get_text_config(), "sliding_window", None)
        limit = min(backbone.max_tokens, window or backbone.max_tokens)
        encoder = QuestionEncoder(prompt, catalogue, backbone.tokenizer, settings, limit)
        layers = config.adapters.num_layers
        model = LikelihoodModel(backbone, parts.adapter, layers, parts.private, encoder.answers)
        return cls(model, encoder)

    def ask(self, queries: Sequence[Query]) -> AskedQuestions:
        """Read queries up to the adapted layers; the items in question are their targets.

        Raises:
            DataError: A query has no target.
        """
        return AskedQuestions(self.model, self.encoder, queries)

    def stack(self, shared: SharedState, private: Tensors, num_clients: int) -> Tensors:
        """Shared tensors repeated per client (no copy) beside stacked private ones [C, ...]."""
        own = {name: value.to(self.model.device) for name, value in private.items()}
        return stacked_tensors(shared.tensors, num_clients, self.model.device) | own

    def score(
        self, asked: AskedQuestions, stacked: Tensors, modes: Mapping[Mode, Parts | None]
    ) -> dict[Mode, list[np.ndarray]]:
        """Score the items of queries, each of a client of its own.

        Args:
            asked: C queries.
            stacked: The clients' tensors [C, ...], from `stack`.
            modes: Per mode which adapters take part; None: the language model without adapters.

        Returns:
            Per mode and query log-odds of yes against no, float32 beside the query's targets.
        """
        found: dict[Mode, list[np.ndarray]] = {mode: [] for mode in modes}
        start = 0
        while start < len(asked):
            stop = self._end_of_chunk(asked, start)
            batch = collate_questions(asked.rows[start:stop], asked.states[start:stop])
            own = {name: value[start:stop] for name, value in stacked.items()}
            for mode, parts in modes.items():
                odds = self.model.log_odds(batch, own, parts)
                found[mode] += [one.cpu().numpy() for one in odds]
            start = stop
        return found

    @staticmethod
    def _end_of_chunk(asked: AskedQuestions, start: int) -> int:
        longest = num_rows = 0
        for stop in range(start, len(asked)):
            longest = max(longest, *(len(row.tokens) for row in asked.rows[stop]))
            num_rows += len(asked.rows[stop])
            if stop > start and longest * num_rows > _TOKENS_AT_ONCE:
                return stop
        return len(asked)


def rerank(
    items: np.ndarray, scores: np.ndarray, log_odds: np.ndarray, weight: float = 1.0
) -> np.ndarray:
    """Put a list into a new order by its scores and the answers of the language model.

    Both are standardised over the list, because their units differ, and mixed as
    (1 - weight) · score + weight · log-odds. Ties keep the order of the list.

    Args:
        items: int [n], the list, the best first.
        scores: [n], the scores that made it.
        log_odds: [n], from `LikelihoodScorer.score`.
        weight: From 0, the list as it is, to 1, the answers alone.

    Returns:
        The items in their new order, int [n].

    Raises:
        DataError: Lengths differ, or ``weight`` is not between 0 and 1.
    """
    if not len(items) == len(scores) == len(log_odds):
        raise DataError(
            f"{len(items)} items, {len(scores)} scores, {len(log_odds)} answers: give one each"
        )
    if not 0 <= weight <= 1:
        raise DataError(f"weight is {weight}; set it between 0 and 1")
    mixed = (1 - weight) * _standardised(scores) + weight * _standardised(log_odds)
    return items[np.argsort(-mixed, kind="stable")]


def _standardised(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    spread = values.std() if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))
