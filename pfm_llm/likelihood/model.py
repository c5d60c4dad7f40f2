"""Yes or no from the language model: from rows of questions to log-odds, of many clients at once.

With h the normalised last state of a question, and e the rows of the language-modelling head,

    log-odds = (e_yes - e_no) . h  (+ b_yes - b_no)

which is the logit of yes minus that of no. No other row of the head takes part. The shared and the
private LoRA act in the adapted layers as in `model.cohort`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pfm_llm.base.errors import BackboneError
from pfm_llm.data.history import NO_LABEL
from pfm_llm.likelihood.questions import QuestionRow, pack
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.batches import Dropout, joined, spans
from pfm_llm.model.cohort import Parts
from pfm_llm.model.layers import CohortLayers
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.private.part import PrivatePart
from pfm_llm.protocol.types import Tensors

_PADDING = -1
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Of log-odds, relative to the mean size of logits, in the check of a new model."""


@dataclass(frozen=True)
class QuestionBatch:
    """Rows of questions of a chunk of clients, ready for the top.

    Attributes:
        trunk: [N, T, d] in the backbone's dtype, right-padded with zeros.
        row_clients: int64 [N], index of each row's client in the chunk; ascending.
        row_lengths: int64 [N], tokens of each row.
        places: int64 [N, T], see `QuestionRow`.
        parts: int64 [N, T], likewise; -1 in padding.
        rows, ends: int64 [K], row and token index of the end of every question, in order.
        liked: int64 [K], see `QuestionRow`.
        questions_per_client: How many of the K questions belong to each client.
    """

    trunk: torch.Tensor
    row_clients: torch.Tensor
    row_lengths: torch.Tensor
    places: torch.Tensor
    parts: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor
    liked: torch.Tensor
    questions_per_client: tuple[int, ...]

    @property
    def num_clients(self) -> int:
        """How many clients the chunk has."""
        return len(self.questions_per_client)


def collate_questions(
    rows: Sequence[Sequence[QuestionRow]], states: Sequence[Sequence[torch.Tensor]]
) -> QuestionBatch:
    """Put the rows of several clients into one batch.

    Args:
        rows: Per client its rows.
        states: Per client and row the trunk states [T, d].
    """
    flat = [(c, row) for c, own in enumerate(rows) for row in own]
    trunk = nn.utils.rnn.pad_sequence([s for own in states for s in own], batch_first=True)
    device = trunk.device
    lengths = torch.tensor([len(row.tokens) for _, row in flat])
    counts = torch.tensor([len(row) for _, row in flat])
    places, parts = _layout([row for _, row in flat])
    return QuestionBatch(
        trunk=trunk,
        row_clients=torch.tensor([c for c, _ in flat], device=device),
        row_lengths=lengths.to(device),
        places=places.to(device),
        parts=parts.to(device),
        rows=torch.arange(len(flat)).repeat_interleave(counts).to(device),
        ends=joined([row.ends for _, row in flat]).to(device),
        liked=joined([row.liked for _, row in flat]).to(device),
        questions_per_client=tuple(sum(map(len, own)) for own in rows),
    )


class LikelihoodModel:
    """Log-odds of yes against no.

    Args:
        backbone: The frozen model.
        adapter: The adapted layers.
        num_layers: How many layers are adapted, counted from the top.
        private: The private part.
        answers: The tokens of yes and of no.

    Raises:
        BackboneError: The architecture computes other logits from the last state than a linear
            head does, or does not read rows of questions as it reads each question alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: DualAdapter,
        num_layers: int,
        private: PrivatePart,
        answers: tuple[int, int],
    ) -> None:
        self.private = private
        self.device = backbone.device
        self._trunk, top = backbone.split(num_layers)
        self._layers = CohortLayers(top, adapter.top_paths(), adapter.scale())
        weights, biases = head_rows(backbone, answers)
        self._direction, self._offset = weights[0] - weights[1], biases[0] - biases[1]
        self._check(backbone, answers)

    @torch.no_grad()
    def trunk_states(
        self, rows: Sequence[QuestionRow], batch_tokens: int = 8192
    ) -> list[torch.Tensor]:
        """The states below the adapted layers.

        Args:
            rows: Any number of rows.
            batch_tokens: Bound on padded tokens per forward pass.

        Returns:
            For each row its states [T, d] in the backbone's dtype.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        states: dict[int, torch.Tensor] = {}
        start = 0
        while start < len(order):
            stop = start + max(1, batch_tokens // len(rows[order[start]].tokens))
            batch = [rows[i] for i in order[start:stop]]
            tokens = nn.utils.rnn.pad_sequence([joined([r.tokens]) for r in batch], True)
            places, parts = (one.to(self.device) for one in _layout(batch))
            hidden = self._trunk(
                input_ids=tokens.to(self.device), use_cache=False, **_sight(places, parts)
            ).last_hidden_state
            for i, own in zip(order[start:stop], hidden, strict=True):
                states[i] = own[: len(rows[i].tokens)].clone()
            start = stop
        return [states[i] for i in range(len(rows))]

    @torch.no_grad()
    def log_odds(
        self, batch: QuestionBatch, stacked: Tensors, parts: Parts | None
    ) -> list[torch.Tensor]:
        """Log-odds of yes against no for each question of each client.

        Args:
            batch: The rows.
            stacked: The clients' tensors [C, ...].
            parts: The active adapters; None: the language model without adapters.

        Returns:
            C tensors float32 [K_c].
        """
        return self._log_odds(batch, stacked, parts)

    def losses(
        self, batch: QuestionBatch, stacked: Tensors, parts: Parts, dropout: Dropout | None = None
    ) -> list[torch.Tensor]:
        """The loss (nats) of each client: the mean cross-entropy of yes and no over its questions.

        Args:
            batch: The rows; each question has an answer.
            stacked: The clients' tensors [C, ...].
            parts: The active adapters.
            dropout: The dropout of this step.

        Returns:
            C scalars; each depends only on its own client's slice of ``stacked``.
        """
        found = self._log_odds(batch, stacked, parts, dropout)
        liked = batch.liked.float().split(batch.questions_per_client)
        return [
            F.binary_cross_entropy_with_logits(odds, own)
            for odds, own in zip(found, liked, strict=True)
        ]

    def _log_odds(
        self,
        batch: QuestionBatch,
        stacked: Tensors,
        parts: Parts | None,
        dropout: Dropout | None = None,
    ) -> list[torch.Tensor]:
        if parts is None:
            self._layers.clear()
        else:
            private, weight = self.private, parts.private_weight
            self._layers.set_factors(
                batch, stacked, parts.shared_lora, private if weight else None, weight, dropout
            )
        where, sight = (batch.rows, batch.ends), _sight(batch.places, batch.parts)
        states = self._layers.states(batch.trunk, where, sight, dropout).float()
        odds = states @ self._direction + self._offset
        return [odds[span] for span in spans(batch.questions_per_client)]

    @torch.no_grad()
    def _check(self, backbone: Backbone, answers: tuple[int, int]) -> None:
        """Compare two questions of a row with the whole model, which reads each by itself."""
        history, asked = [0, 1, 2, 3, 4], ([5, 6, 7], [6, 8, 9, 7])
        pieces = [np.array(piece) for piece in asked]
        row = pack(np.array(history), pieces, np.full(len(pieces), NO_LABEL))
        batch = collate_questions([[row]], [self.trunk_states([row])])
        (found,) = self.log_odds(batch, {}, None)
        for odds, piece in zip(found, asked, strict=True):
            tokens = torch.tensor([history + piece], device=self.device)
            logits = backbone.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
            expected = logits[answers[0]] - logits[answers[1]]
            difference = (odds - expected).abs() / logits.abs().mean().clamp_min(1.0)
            if not difference <= _TOLERANCE[backbone.dtype]:
                raise BackboneError(
                    f"{backbone.name} ({type(backbone.model).__name__}) cannot answer questions: "
                    f"its log-odds differ from those of the whole model by {float(difference):.2g}"
                    "; choose a decoder with rotary positions, attention sdpa and a plain "
                    "language-modelling head (Llama, Qwen, Gemma 3)"
                )


def head_rows(backbone: Backbone, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of the language-modelling head, whether or not it is tied to the embeddings.

    Args:
        backbone: The language model.
        tokens: Token ids.

    Returns:
        Weights [len(tokens), d] and biases [len(tokens)], float32; a head without biases has zeros.

    Raises:
        BackboneError: The model has no linear head.
    """
    head = backbone.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        raise BackboneError(
            f"{backbone.name} has no linear language-modelling head; choose a causal language model"
        )
    rows = torch.as_tensor(tokens, device=weight.device)
    bias = getattr(head, "bias", None)
    biases = torch.zeros(len(rows), device=weight.device) if bias is None else bias[rows]
    return weight[rows].float(), biases.float()


def _layout(rows: Sequence[QuestionRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and parts of rows, int64 [N, T]."""
    pad = nn.utils.rnn.pad_sequence
    places = pad([joined([row.places]) for row in rows], True)
    return places, pad([joined([row.parts]) for row in rows], True, _PADDING)


def _sight(places: torch.Tensor, parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a decoder: positions int64 [N, T] and a mask bool [N, 1, T, T].

    A token sees the earlier tokens of the history and of its own question.
    """
    causal = torch.ones(
        parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device
    ).tril()
    seen = (parts[:, None] == 0) | (parts[:, None] == parts[:, :, None])
    return {"position_ids": places, "attention_mask": (seen & causal)[:, None]}
