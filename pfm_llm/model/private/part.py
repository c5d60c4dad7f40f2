"""What a private part is: everything that depends on its kind, behind one class.

A kind is a subclass in a file of its own and a line in `config.private_kinds`; it overrides what
it does and leaves the rest. The base class is the private part that does nothing.
"""

from typing import ClassVar

import torch

from pfm_llm.config.choices import Task
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.outputs import SharedView
from pfm_llm.protocol.parameters import Parameter, Sizes
from pfm_llm.protocol.types import Tensors

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [C, r, in] and B [C, out, r] of one low-rank term, for every client of a chunk."""


class PrivatePart:
    """A kind of private part; this one is empty.

    Tensors of a client are named ``private.…`` and shared ones that only this kind needs
    ``basis.…``. Stacked tensors have a leading client dimension C.

    Attributes:
        takes_steps: Its tensors move by gradient steps and are kept from round to round;
            otherwise `fit` computes them from the history at hand.
        acts_on_states: It changes user vectors, so they cannot be shared between private parts.
        reads_text: `fit` needs user vectors, that is a pass of the language model.
    """

    takes_steps: ClassVar[bool] = False
    acts_on_states: ClassVar[bool] = False

    def __init__(self, config: ExperimentConfig, sizes: Sizes) -> None:
        """Make the private part of an experiment.

        Args:
            config: Private adapter, head, tasks, seed and the server's learning rates.
            sizes: Of the language model and of the catalogue.
        """
        self.config = config
        self.settings = config.adapters.private
        self.sizes = sizes

    @property
    def reads_text(self) -> bool:
        """Whether `fit` needs user vectors."""
        return False

    def shared_parameters(self) -> list[Parameter]:
        """The shared tensors that only this kind needs: its basis."""
        return []

    def initial(self, client_id: str) -> dict[str, torch.Tensor]:
        """A client's own tensors before anything was learned, float32; they change nothing."""
        return {}

    def factors(self, module: str, stacked: Tensors, weight: float) -> Factors | None:
        """The LoRA of an adapted module, B with its scale and times ``weight``."""
        return None

    def head_factors(self, stacked: Tensors, weight: float) -> Factors | None:
        """A low-rank term on the head's projection of the user's state, B times ``weight``."""
        return None

    def past_scores(self, view: SharedView) -> torch.Tensor | None:
        """What the part adds to each output's scores, known from the outputs before it alone.

        The objective trains the shared tensors of this kind on it, with the shared scores fixed.

        Returns:
            float32 [K, I], or None where the part adds nothing to scores.
        """
        return None

    def past_likes(self, view: SharedView) -> torch.Tensor | None:
        """The same for the log-odds of likes: float32 [M, R], a row for each of M fits."""
        return None

    def dropout_width(self, own: Tensors) -> int:
        """Numbers r of an output on which `Outputs.kept_private` is drawn; 0: none."""
        return 0

    def fit(self, view: SharedView) -> dict[str, torch.Tensor]:
        """A client's own tensors, from all that its outputs show; zero where there are none.

        Only parts that take no steps are fitted.
        """
        raise NotImplementedError(f"{type(self).__name__} takes gradient steps; it has no fit")

    def added_scores(
        self, own: Tensors, task: Task, texts: torch.Tensor, weight: float
    ) -> torch.Tensor | None:
        """What is added to the scores of the whole catalogue when a user is served.

        Args:
            own: One client's tensors, private ones too.
            task: The next item, or likes.
            texts: float32 [I, D], whitened.
            weight: How strongly the private part counts.

        Returns:
            float32 [I], or None where the part adds nothing.
        """
        return None

    def active(self, stacked: Tensors) -> torch.Tensor:
        """Which clients' own tensors change anything, bool [C]."""
        changes = [v.flatten(1).ne(0).any(1) for v in self.deciding(stacked).values()]
        return torch.stack(changes).any(0)

    def deciding(self, stacked: Tensors) -> Tensors:
        """Those of a client's own tensors without which, at zero, nothing changes."""
        return stacked
