"""The interface of a private part: one class holds everything that depends on the kind.

A kind is a subclass in its own file and a line in `config.private_kinds`. The subclass overrides
the methods that its kind needs. The base class is the private part that does nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from pfm_llm.config.choices import Task
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.outputs import SharedView
from pfm_llm.protocol.parameters import Parameter, Sizes
from pfm_llm.protocol.types import Tensors

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [C, r, in] and B [C, out, r] of one low-rank term, for every client of a chunk."""

OutputLora = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""A [q, D], B [I, q] and a bias [I] of a LoRA on the layer that turns user vectors into scores."""


@dataclass(frozen=True)
class PastLora:
    """A LoRA at each of K outputs, read off what came before it.

    Attributes:
        coefficients: By module float32 [K, r].
        read: float32 [K, q], the vectors that they follow from, without dropout.
    """

    coefficients: Mapping[str, torch.Tensor]
    read: torch.Tensor


class PrivatePart:
    """A private part; this base class is the empty one.

    The private tensors of a client are named ``private.…``. Shared tensors that only this kind
    needs are named ``basis.…``. Stacked tensors have a leading client dimension C.

    Attributes:
        takes_steps: Whether gradient steps train the private tensors, which the client keeps from
            round to round. Otherwise `fit` computes them from a history.
        acts_on_states: Whether it changes user vectors, which then hold for one private part alone.
        reads_text: Whether `fit` needs user vectors, and so a pass of the language model.
        pieces: Name of a piece that can be served alone to the prefix of its private tensors; a
            study measures each. Empty where the part is one piece.
    """

    takes_steps: ClassVar[bool] = False
    acts_on_states: ClassVar[bool] = False
    pieces: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: ExperimentConfig, sizes: Sizes) -> None:
        """Make the private part of an experiment.

        Args:
            config: Private adapter, head, tasks, seed and the server's learning rates.
            sizes: The sizes of the language model and of the catalogue.
        """
        self.config = config
        self.settings = config.adapters.private
        self.sizes = sizes

    @property
    def lora_modules(self) -> Mapping[str, str]:
        """The modules of `lora`, each with the name of the private tensor of its coefficients [r].

        They are of the last layer, and no other token reads their output.
        """
        return {}

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The private tensors [n] that the client may change by steps of its own, after `fit`."""
        return ()

    @property
    def reads_text(self) -> bool:
        """Whether `fit` needs user vectors."""
        return False

    def shared_parameters(self) -> list[Parameter]:
        """The basis: the shared tensors that only this kind needs."""
        return []

    def initial(self, client_id: str) -> dict[str, torch.Tensor]:
        """A client's private tensors before training, float32; they change no score."""
        return {}

    def factors(self, module: str, stacked: Tensors, weight: float) -> Factors | None:
        """The LoRA of an adapted module, B times its scale and ``weight``; None: no LoRA."""
        return None

    def own_lora(self, own: Tensors, weight: float) -> dict[str, Factors]:
        """By adapted module a client's LoRA, A [r, in] and B [out, r], from its tensors [...]."""
        stacked = {name: value[None] for name, value in own.items()}
        found = {module: self.factors(module, stacked, weight) for module in self.sizes.modules}
        return {module: (one[0][0], one[1][0]) for module, one in found.items() if one}

    def head_factors(self, stacked: Tensors, weight: float) -> Factors | None:
        """A low-rank term on the head's projection of user states, B times ``weight``, or None."""
        return None

    def lora(self, stacked: Tensors) -> dict[str, Factors]:
        """By adapted module a LoRA in the last layer whose coefficients `past_lora` reads.

        B is multiplied by its scale. It is empty where the kind has none, and has no other modules
        than `lora_modules`.
        """
        return {}

    def past_lora(self, view: SharedView) -> PastLora:
        """The coefficients of `lora` at each output, from the outputs before it alone."""
        raise NotImplementedError(f"{type(self).__name__} has no LoRA that is read off the past")

    def past_scores(self, view: SharedView) -> torch.Tensor | None:
        """The scores that the part adds at each output, from the outputs before it alone.

        The objective trains the basis on these scores, while the shared scores are fixed.

        Returns:
            float32 [K, I], or None where the part adds nothing to scores.
        """
        return None

    def past_likes(self, view: SharedView) -> torch.Tensor | None:
        """`past_scores` for the log-odds of likes: float32 [M, R], a row for each of M fits."""
        return None

    def dropout_width(self, own: Tensors) -> int:
        """Width r of the private vectors with dropout (`Outputs.kept_private`); 0: no dropout."""
        return 0

    def fit(self, view: SharedView) -> dict[str, torch.Tensor]:
        """A client's private tensors, fitted to all of its outputs; zero without outputs.

        Only parts that take no steps are fitted.
        """
        raise NotImplementedError(f"{type(self).__name__} takes gradient steps; it has no fit")

    def added_scores(
        self,
        own: Tensors,
        task: Task,
        texts: torch.Tensor,
        weight: float,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The scores that are added for the whole catalogue when a user is served.

        Args:
            own: One client's shared and private tensors.
            task: The next item, or likes.
            texts: float32 [I, D], whitened texts of the catalogue.
            weight: Factor on the private part.
            vectors: float32 [K, D], the user vectors of the next item; None for likes.

        Returns:
            float32 [I], or [K, I] where they depend on user vectors; None where the part adds
            nothing.
        """
        return None

    def output_lora(self, own: Tensors, texts: torch.Tensor, weight: float) -> OutputLora | None:
        """What `added_scores` adds for the next item, as a LoRA of one client; None: no LoRA.

        ``vectors @ A.T @ B.T + bias`` are the added scores. The arguments are those of
        `added_scores`.
        """
        return None

    def active(self, stacked: Tensors) -> torch.Tensor:
        """Whether each client's private tensors change any score, bool [C]."""
        changes = [v.flatten(1).ne(0).any(1) for v in self.deciding(stacked).values()]
        return torch.stack(changes).any(0)

    def deciding(self, stacked: Tensors) -> Tensors:
        """The private tensors that decide: when they are zero, the part changes no score."""
        return stacked
