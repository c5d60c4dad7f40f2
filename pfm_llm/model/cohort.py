"""The many-clients pass: one batch and one frozen top, with each client's own pair of adapters.

The frozen weights are the same for everybody, so one matrix product serves the tokens of a
whole chunk of clients. Each row of the batch (one window) carries its client's LoRA: the factors of
the shared and the private adapter are concatenated along the rank, and B is multiplied by the
scale. ``torch.baddbmm`` then adds the low-rank product to the frozen output::

    y[n] = x[n] W^T + (x[n] [A_s; A_p]^T) [s_s B_s, s_p B_p]^T

A test holds that the result equals PEFT with both adapters active, one client at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pfm_llm.config.choices import Reading, Task
from pfm_llm.data.history import History
from pfm_llm.model import head as recommender_head
from pfm_llm.model.ablation import Sight
from pfm_llm.model.batches import ChunkBatch, Dropout, joined, spans
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.model.layers import CohortLayers
from pfm_llm.model.new_items import NEW_BIAS, excluded_items, with_new_biases
from pfm_llm.model.objective import Objective
from pfm_llm.model.outputs import Contexts, Outputs, SharedView, contexts_of
from pfm_llm.model.private.part import Factors
from pfm_llm.protocol.types import Tensors

_FACTOR = (".A", ".B")
PrivateLosses = Callable[[Tensors], list[torch.Tensor]]
"""The private loss of each client; see `CohortModel.private_losses`."""


@dataclass(frozen=True)
class Parts:
    """The adapters that are active, and the weight of the private one.

    Attributes:
        shared_lora: Whether the shared LoRA is active.
        private_weight: Factor on the private part; 0 switches it off.
    """

    shared_lora: bool = True
    private_weight: float = 1.0


class CohortModel:
    """Top view, head and catalogue: from trunk states to losses or scores of many clients.

    Args:
        top: The top view of the backbone; its adapted linear layers are replaced.
        modules: Path in the full model to path in ``top`` of each adapted layer.
        scale: The factor of the shared adapter's product B A.
        normaliser: The catalogue's whitening.
        objective: The loss, over the whitened texts of the catalogue.
        sight: What the top sees of a window; where it sees nothing, user states are zero.
    """

    def __init__(
        self,
        top: Any,
        modules: dict[str, str],
        scale: float,
        normaliser: Normaliser,
        objective: Objective,
        sight: Sight | None = None,
    ) -> None:
        self._sight = sight or Sight()
        self.layers = CohortLayers(top, modules, scale)
        self.layers.check_last(objective.private.lora_modules)
        device = next(top.parameters()).device
        self._normaliser = normaliser.to(device)
        self.objective = objective.to(device)

    @property
    def item_texts(self) -> torch.Tensor:
        """Whitened text embeddings of the catalogue, float32 [I, D]."""
        return self.objective.item_texts

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self.item_texts)

    def losses(
        self,
        batch: ChunkBatch,
        stacked: Tensors,
        parts: Parts,
        dropout: Dropout | None = None,
    ) -> list[torch.Tensor]:
        """The loss (nats) of each client; see `Objective`.

        Args:
            batch: The windows, collated to train.
            stacked: Every tensor with a leading client dimension [C, ...], private ones too.
            parts: The active adapters.
            dropout: The dropout of this step; None: no dropout.

        Returns:
            C scalars; each depends only on its own client's slice of ``stacked``.
        """
        personal = bool(parts.private_weight)
        reads = personal and self._sight.has_pass
        lora = self.objective.private.lora(stacked) if reads else {}
        owns, states = self._read(batch, stacked, parts, dropout, twice=bool(lora))
        vectors = self._vectors(batch, owns, states, self._private_heads(stacked, batch, parts))
        read = self._outputs(batch, vectors, owns)
        if dropout is not None:
            width = self.objective.private.dropout_width(owns[0])
            num_items = self.num_items if NEW_BIAS in owns[0] else 0
            read = [one.with_dropout(dropout, c, width, num_items) for c, one in enumerate(read)]
        if lora:
            read = self._moved(batch, owns, states, read, lora)
        return [
            self.objective.loss(own, outputs, personal)
            for own, outputs in zip(owns, read, strict=True)
        ]

    def private_losses(self, batch: ChunkBatch, stacked: Tensors) -> PrivateLosses:
        """The private loss of each client, as a function of a change of its own LoRA.

        Args:
            batch: The windows, collated to train.
            stacked: The shared tensors, with a leading client dimension.

        Returns:
            A function of changes [C, n] by the names of `PrivatePart.coefficients`, which are added
            to the coefficients at every position. It gives C scalars (nats), each of its own
            client's change alone; see `Objective.private_loss`. It is valid until the model's next
            pass.
        """
        lora = self.objective.private.lora(stacked) if self._sight.has_pass else {}
        off = Parts(private_weight=0.0)
        with torch.no_grad():
            owns, states = self._read(batch, stacked, off, twice=bool(lora))
            vectors = self._vectors(batch, owns, states, [None] * batch.num_clients)
            read = self._outputs(batch, vectors, owns)

        def losses(changes: Tensors) -> list[torch.Tensor]:
            found = [
                dataclasses.replace(one, steps={name: value[c] for name, value in changes.items()})
                for c, one in enumerate(read)
            ]
            if lora:
                found = self._moved(batch, owns, states, found, lora)
            return [self.objective.private_loss(*one) for one in zip(owns, found, strict=True)]

        return losses

    @torch.no_grad()
    def fit(self, batch: ChunkBatch, stacked: Tensors) -> dict[str, torch.Tensor]:
        """Fit each client's private tensors to a shared state; stacked [C, ...].

        Args:
            batch: The clients' whole histories, collated to train.
            stacked: The shared tensors, with a leading client dimension.
        """
        owns, vectors = self._user_vectors(batch, stacked, Parts(private_weight=0.0))
        return self._fitted(owns, self._outputs(batch, vectors, owns))

    @torch.no_grad()
    def fit_without_text(
        self, histories: Sequence[History], stacked: Tensors
    ) -> dict[str, torch.Tensor]:
        """`fit` for a private part that reads no text; the language model does not run.

        Args:
            histories: One history per client.
            stacked: The shared tensors, with a leading client dimension.
        """
        outputs = [
            Outputs.of_history(
                *(joined([values]).to(self.item_texts.device) for values in (own.items, own.labels))
            )
            for own in histories
        ]
        return self._fitted(self.slices(stacked, len(histories)), outputs)

    def _fitted(
        self, owns: Sequence[Tensors], outputs: Sequence[Outputs]
    ) -> dict[str, torch.Tensor]:
        found = [self.objective.fit(*one) for one in zip(owns, outputs, strict=True)]
        return {name: torch.stack([vectors[name] for vectors in found]) for name in found[0]}

    @torch.no_grad()
    def user_vectors(self, batch: ChunkBatch, stacked: Tensors, parts: Parts) -> list[torch.Tensor]:
        """Per client its user vectors [K_c, D] at every output of the batch, float32.

        They do not contain the scores that a private part adds; see `score_vectors`.
        """
        return self._user_vectors(batch, stacked, parts)[1]

    def scores(self, batch: ChunkBatch, stacked: Tensors, parts: Parts) -> torch.Tensor:
        """Scores [K, I] of the catalogue at every output of the batch, float32."""
        return self.score_vectors(self.user_vectors(batch, stacked, parts), stacked, parts)

    @torch.no_grad()
    def score_vectors(
        self, vectors: Sequence[torch.Tensor], stacked: Tensors, parts: Parts
    ) -> torch.Tensor:
        """Scores [K, I] of the catalogue for user vectors from `user_vectors`, float32."""
        found = []
        for own, states in zip(self.slices(stacked, len(vectors)), vectors, strict=True):
            own = with_new_biases(own, self.item_texts)
            scores = recommender_head.score_items(own, states, self.item_texts)
            found.append(self._with_private(scores, own, Task.NEXT_ITEM, parts, states))
        return torch.cat(found)

    @torch.no_grad()
    def like_logits(self, stacked: Tensors, parts: Parts) -> torch.Tensor:
        """Log-odds [C, I] that each client likes each item, float32.

        They depend on no user vector. Only the private part makes them differ between clients.
        """
        found = []
        for own in self.slices(stacked, len(stacked[recommender_head.LIKE_TEXT])):
            logits = recommender_head.like_logits(own, self.item_texts)
            found.append(self._with_private(logits, own, Task.LIKE, parts))
        return torch.stack(found)

    def _with_private(
        self,
        scores: torch.Tensor,
        own: Tensors,
        task: Task,
        parts: Parts,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores [..., I] with those that the private part adds."""
        if not (weight := parts.private_weight):
            return scores
        added = self.objective.private.added_scores(own, task, self.item_texts, weight, vectors)
        return scores if added is None else scores + added

    @torch.no_grad()
    def zero_shot_scores(self, batch: ChunkBatch) -> torch.Tensor:
        """Cosine scores [K, I] before any training, float32.

        They are of the untouched backbone's states, zero without a pass; where it reads items, of
        the sum of the item vectors of a window.
        """
        if self._sight.reading is Reading.ITEMS:
            states = batch.sums(self.item_texts)
        else:
            self.layers.clear()
            states = self._output_states(batch.trunk, batch)
        return recommender_head.zero_shot_scores(states, self.item_texts)

    def _user_vectors(
        self, batch: ChunkBatch, stacked: Tensors, parts: Parts
    ) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
        """Per client its tensors without LoRA factors, and its user vectors [K_c, D]."""
        owns, states = self._read(batch, stacked, parts)
        return owns, self._vectors(batch, owns, states, self._private_heads(stacked, batch, parts))

    def _read(
        self,
        batch: ChunkBatch,
        stacked: Tensors,
        parts: Parts,
        dropout: Dropout | None = None,
        twice: bool = False,
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Per client its tensors without LoRA factors; and the whitened states [K, d] of all."""
        owns = self.slices(stacked, batch.num_clients)
        private = self.objective.private if parts.private_weight else None
        self.layers.set_factors(
            batch, stacked, parts.shared_lora, private, parts.private_weight, dropout
        )
        return owns, self._output_states(self._with_item_inputs(batch, owns), batch, dropout, twice)

    def _vectors(
        self,
        batch: ChunkBatch,
        owns: Sequence[Tensors],
        states: torch.Tensor,
        private_heads: Sequence[Factors | None],
    ) -> list[torch.Tensor]:
        """Per client its user vectors [K_c, D], from whitened states [K, d]."""
        clients, contexts = spans(batch.outputs_per_client), self._contexts(batch, owns)
        return [
            recommender_head.user_vectors(own, states[at], batch.num_read[at], private, context)
            for own, at, private, context in zip(
                owns, clients, private_heads, contexts, strict=True
            )
        ]

    def _moved(
        self,
        batch: ChunkBatch,
        owns: Sequence[Tensors],
        states: torch.Tensor,
        read: Sequence[Outputs],
        lora: Mapping[str, Factors],
    ) -> list[Outputs]:
        """The outputs with what the private LoRA of each position's past does to user vectors.

        The last layer runs once more, with the coefficients of each position; see
        `CohortLayers.states_by_token`. A user vector is linear in the state, so its context term
        need not be computed again.
        """
        private, texts, found = self.objective.private, self.item_texts, []
        past = [private.past_lora(SharedView(*one, texts)) for one in zip(owns, read, strict=True)]
        coefficients = {name: torch.cat([one.coefficients[name] for one in past]) for name in lora}
        again = self.layers.states_by_token(batch, batch.places, lora, coefficients)
        moved = self._normaliser(again) - states.detach()
        each = spans(batch.outputs_per_client)
        for one, own, before, span in zip(read, owns, past, each, strict=True):
            fixed = {name: value.detach() for name, value in own.items()}
            after = recommender_head.user_vectors(fixed, moved[span], batch.num_read[span])
            found.append(dataclasses.replace(one, moved=after, read=before.read))
        return found

    def slices(self, stacked: Tensors, num_clients: int) -> list[dict[str, torch.Tensor]]:
        """Per client its slice of every tensor that is no LoRA factor, with a row for each item."""
        # unbind instead of indexing: its backward is one stack, not C scatters into zeros.
        slices = {n: v.unbind(0) for n, v in stacked.items() if not n.endswith(_FACTOR)}
        owns = [{n: v[c] for n, v in slices.items()} for c in range(num_clients)]
        if self.objective.codes is not None:
            return self.objective.codes.expanded_clients(owns)
        return [recommender_head.with_met_rows(own) for own in owns]

    def _outputs(
        self, batch: ChunkBatch, vectors: Sequence[torch.Tensor], owns: Sequence[Tensors]
    ) -> list[Outputs]:
        seen = batch.seen(self.num_items) if self.objective.unseen_only else None
        own_items: Sequence[torch.Tensor | None] = [None] * len(owns)
        if recommender_head.ITEM_MET in owns[0]:
            own_items = batch.items_per_client
        return [
            Outputs(
                own,
                batch.targets[span],
                batch.liked[span],
                met,
                batch.known[span],
                seen=excluded_items(head, None if seen is None else seen[span], items),
                items=items,
                later=batch.later[span],
            )
            for own, head, span, met, items in zip(
                vectors,
                owns,
                spans(batch.outputs_per_client),
                batch.histories_per_client,
                own_items,
                strict=True,
            )
        ]

    def _contexts(self, batch: ChunkBatch, heads: Sequence[Tensors]) -> Contexts:
        """Per client the context term of its user vectors; see `contexts_of`."""
        tokens = self.layers.tokens
        if tokens is None:
            return contexts_of(batch, heads, self.item_texts)
        tokens.contexts = tokens.contexts or contexts_of(batch, heads, self.item_texts)
        return tokens.contexts

    def _with_item_inputs(self, batch: ChunkBatch, heads: Sequence[Tensors]) -> torch.Tensor:
        """The trunk states [N, T, d], with the ID input of each item added at its last token."""
        if self.layers.goes_on:
            return batch.trunk  # nothing reads them
        added = [
            recommender_head.item_inputs(head, batch.items[span])
            for head, span in zip(heads, spans(batch.positions_per_client), strict=True)
        ]
        values = [value for value in added if value is not None]
        if not values or not self._sight.has_pass:
            return batch.trunk
        inputs = torch.cat(values).to(batch.trunk.dtype)
        return batch.trunk.index_put((batch.rows, batch.ends), inputs, accumulate=True)

    def _output_states(
        self,
        hidden: torch.Tensor,
        batch: ChunkBatch,
        dropout: Dropout | None = None,
        twice: bool = False,
    ) -> torch.Tensor:
        """Run the top on hidden states [N, T, d]; whitened states [K, d] at the outputs."""
        if not self._sight.has_pass:
            return self._normaliser.mean.new_zeros(len(batch.outputs), len(self._normaliser.mean))
        sight = self._sight.arguments(batch)
        return self._normaliser(self.layers.states(hidden, batch.places, sight, dropout, twice))

    def _private_heads(
        self, stacked: Tensors, batch: ChunkBatch, parts: Parts
    ) -> Sequence[Factors | None]:
        weight = parts.private_weight
        found = self.objective.private.head_factors(stacked, weight) if weight else None
        return [None] * batch.num_clients if found is None else list(zip(*found, strict=True))
