"""Histories as one state for each item: ``window.reading: items``.

The layers below the adapted ones read the text of each item once, by itself, behind the header of
the prompt. The state at its last token stands for the item. A window is then the header's states
and one state for each of its items, and the adapted layers read the items as a language model reads
words. HLLM (Chen et al. 2024, arXiv 2409.12740, section 3) has the same two levels, with two
language models instead of two parts of one.

A pass takes one position for an item instead of one for each of its tokens, so that one window can
hold a whole history. The states belong to the catalogue and not to a user: the public cache keeps
them, and no client has to keep any.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pfm_llm.model.backbone import Backbone
from pfm_llm.model.items.vectors import identity_of, kept_states, read_texts
from pfm_llm.text.encoding import HistoryEncoder, Window


@dataclass(frozen=True)
class ItemReader:
    """The states that windows consist of.

    Attributes:
        header: [H, d] in the backbone's dtype, the states of the prompt's header.
        items: [I, d] likewise, the state at the last token of each item's text.
    """

    header: torch.Tensor
    items: torch.Tensor

    def states(self, windows: Sequence[Window]) -> list[torch.Tensor]:
        """For each window its states [H + L, d]."""
        device = self.items.device
        places = [
            torch.tensor(window.items, dtype=torch.int64, device=device) for window in windows
        ]
        return [torch.cat([self.header, self.items[place]]) for place in places]


Trunk = nn.Module | ItemReader | None
"""What turns windows into trunk states: the trunk view of the backbone, which reads all their
tokens; the states of whole items; or nothing."""


def read_items(
    trunk: nn.Module, num_layers: int, backbone: Backbone, encoder: HistoryEncoder
) -> ItemReader:
    """Read the texts of the catalogue, or take their states from the cache.

    Args:
        trunk: The trunk view of the backbone.
        num_layers: The number of layers above it.
        backbone: The language model.
        encoder: Renders and tokenises the catalogue.
    """
    header, pieces = encoder.header_tokens, encoder.prompt_pieces()
    states = kept_states(
        (*identity_of(backbone), f"below {num_layers}"),
        (header, pieces),
        lambda: _read(trunk, backbone, header, pieces),
    )
    states = states.to(device=backbone.device, dtype=backbone.dtype)
    return ItemReader(states[: len(header)], states[len(header) :])


def _read(
    trunk: nn.Module, backbone: Backbone, header: list[int], pieces: list[list[int]]
) -> torch.Tensor:
    """The states of the header and of the last token of each piece, float32 [H + I, d]."""
    with torch.no_grad():
        tokens = torch.tensor([header], device=backbone.device)
        first: torch.Tensor = trunk(input_ids=tokens, use_cache=False).last_hidden_state[0]
    items = read_texts(backbone, [header + piece for piece in pieces], layers=trunk)
    return torch.cat([first.float().cpu(), items])
