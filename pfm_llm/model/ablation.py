"""What a run does without, to measure what it is worth: the values of the setting ``ablation``.

Each is trained like the run that it is compared with, on the same data, head and rates.

==================  ===========================================================================
ablation            difference
==================  ===========================================================================
``no_pass``         user states are zero: no layer reads a history. LoRA on layers, shared or
                    private, ``head.state_proj``, ``head.state_log_n`` and ``head.item_ids_in``
                    have no effect, and are neither trained nor sent.
``one_item``        at each item the adapted layers read that item alone: they see nothing of the
                    items before it.
``no_positions``    to the adapted layers all items stand at one place. They see which items came
                    before; that each item has seen those before it is all that is left of an order.
``shuffled_texts``  the texts are permuted among the items: what a text says has no meaning.
``random_weights``  a language model of the same shape with random weights.
==================  ===========================================================================
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.choices import Ablation, Reading
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.batches import ChunkBatch
from pfm_llm.text.encoding import HistoryEncoder

_OF_THE_PASS = (
    "lora.*",
    "basis.hyper_lora.*.*",  # of a module; that of the layer of scores has a name of one word
    "head.state_proj",
    "head.state_log_n",
    "head.item_ids_in",
)


def has_pass(config: ExperimentConfig) -> bool:
    """Whether the language model reads histories."""
    return config.ablation is not Ablation.NO_PASS


def is_trained(config: ExperimentConfig, name: str) -> bool:
    """Whether a shared tensor has an effect, so that it is to be trained and sent."""
    return has_pass(config) or not any(fnmatchcase(name, of) for of in _OF_THE_PASS)


def texts_of(config: ExperimentConfig, catalogue: Catalogue) -> Catalogue:
    """The catalogue whose texts are read; its ids stay in their order."""
    if config.ablation is not Ablation.SHUFFLED_TEXTS:
        return catalogue
    order = numpy_generator(config.seed, "ablation/texts").permutation(len(catalogue))
    return Catalogue(catalogue.item_ids, catalogue.take(np.asarray(order)).fields)


@dataclass(frozen=True)
class Sight:
    """What the adapted layers see of a window, besides its states.

    Attributes:
        ablation: The ablation.
        header: How many tokens of a window come before its first item.
        reading: Whether they see tokens, or one state for each item.
    """

    ablation: Ablation = Ablation.NONE
    header: int = 0
    reading: Reading = Reading.TOKENS

    @property
    def has_pass(self) -> bool:
        """Whether they see anything."""
        return self.ablation is not Ablation.NO_PASS

    def arguments(self, batch: ChunkBatch) -> dict[str, torch.Tensor]:
        """Further arguments of a decoder: positions int64 [N, T], a mask bool [N, 1, T, T]."""
        if self.ablation not in (Ablation.ONE_ITEM, Ablation.NO_POSITIONS):
            return {}
        num_rows, length = batch.trunk.shape[:2]
        place = torch.arange(length, device=batch.trunk.device).expand(num_rows, length)
        # The item of a token is the number of items that end before it.
        is_end = torch.zeros_like(place).index_put((batch.rows, batch.ends), place.new_ones(()))
        item = is_end.cumsum(1) - is_end
        is_header = place < self.header
        positions = torch.where(is_header, place, self._within(item, place))
        if self.ablation is Ablation.NO_POSITIONS:
            return {"position_ids": positions}
        seen = (item[:, :, None] == item[:, None]) | is_header[:, None]
        seen &= place[:, :, None] >= place[:, None]
        return {"position_ids": positions, "attention_mask": seen[:, None]}

    def _within(self, item: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Positions [N, T] at which each item begins where the header ends."""
        first = torch.full_like(item, item.shape[1])
        first = first.scatter_reduce(1, item, place.clamp_min(self.header), "amin")
        return self.header + place - first.gather(1, item)


def sight_of(config: ExperimentConfig, encoder: HistoryEncoder) -> Sight:
    """What the adapted layers see of windows of an encoder."""
    return Sight(config.ablation, len(encoder.header_tokens), config.window.reading)
