"""The bias of items that nobody has met: learned from met items that a step treats as new.

An item that nobody has met has no embedding, and a bias that no event has moved. Its text alone
ranks it, far below the items whose bias tells that many have met them. With ``item_dropout`` the
federation learns what to expect of such an item::

    bias_i = new_bias + new_text . z_i / sqrt(D)        of an item i that nobody has met

Each step hides a random share of the items, as DropoutNet hides what is learned of items (Volkovs,
Yu and Poutanen 2017, NeurIPS, section 4). A hidden item is scored as if nobody had met it, and all
others as they are served. The cross-entropy of these scores trains ``new_bias`` and ``new_text``
alone: all else is an input here, so no item that somebody has met is ranked otherwise.

====================  ========  ==================
parameter             shape     present with
====================  ========  ==================
head.new_bias         [1]       ``item_dropout``
head.new_text         [D]       ``item_dropout``
====================  ========  ==================
"""

import math

import numpy as np
import torch

from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import learns_met
from pfm_llm.model import head as recommender_head
from pfm_llm.model.items.codes import ItemCodes
from pfm_llm.model.outputs import SharedView
from pfm_llm.protocol.parameters import Parameter
from pfm_llm.protocol.types import Tensors

NEW_BIAS = "head.new_bias"
NEW_TEXT = "head.new_text"


def new_item_parameters(config: ExperimentConfig) -> list[Parameter]:
    """The tensors of the module's table."""
    if not (config.head.item_dropout and learns_met(config)):
        return []
    server = config.federation.server
    bias_rate, rate = (r * server.lr_scale for r in (server.lr_item_bias, server.lr_head))
    return [Parameter(NEW_BIAS, (1,), bias_rate), Parameter(NEW_TEXT, (config.head.dim,), rate)]


def unmet_items(shared: Tensors, codes: ItemCodes | None) -> np.ndarray | None:
    """Which items nobody in the federation has met, bool [I]; None where that is not learned.

    Args:
        shared: The shared tensors.
        codes: The vectors that items share; None: each item has rows of its own.
    """
    if recommender_head.ITEM_MET not in shared:
        return None
    own = {recommender_head.ITEM_MET: shared[recommender_head.ITEM_MET]}
    met = recommender_head.met_items(own if codes is None else codes.expanded(own))
    return None if met is None else (~met).cpu().numpy()


def with_new_biases(own: dict[str, torch.Tensor], texts: torch.Tensor) -> dict[str, torch.Tensor]:
    """One client's tensors, in which an item that nobody has met has the bias of a new one.

    Args:
        own: One client's tensors.
        texts: float32 [I, D], whitened.
    """
    met = recommender_head.met_items(own)
    if met is None or NEW_BIAS not in own:
        return own
    biases = own[recommender_head.ITEM_BIAS].where(met, _biases(own, texts))
    return {**own, recommender_head.ITEM_BIAS: biases}


def scores_with_hidden(view: SharedView, hidden: torch.Tensor) -> torch.Tensor:
    """Scores [K, I] in which some items are scored as new ones; items of the history stay out.

    Args:
        view: A client's outputs.
        hidden: int64 [H], the items that this step treats as new.
    """
    texts, fixed = view.texts[hidden], view.fixed_scores
    of_text = {recommender_head.ITEM_PROJ: view.own[recommender_head.ITEM_PROJ].detach()}
    scores = recommender_head.score_items(of_text, view.outputs.vectors.detach(), texts)
    scores = scores + _biases(view.own, texts)
    is_candidate = fixed[:, hidden].isfinite()
    return fixed.index_copy(1, hidden, scores.where(is_candidate, -torch.inf))


def _biases(own: Tensors, texts: torch.Tensor) -> torch.Tensor:
    """The biases [I] that items of these texts [I, D] have as long as nobody has met them."""
    return texts @ own[NEW_TEXT] / math.sqrt(texts.shape[1]) + own[NEW_BIAS]


def excluded_items(
    head: Tensors, seen: torch.Tensor | None, own: torch.Tensor | None
) -> torch.Tensor | None:
    """The items that are no candidates at each output, bool [K, I] or [I]; None: all are.

    Args:
        head: One client's head parameters.
        seen: bool [K, I], the items that the client has met before each output.
        own: int64 [M], its items, which somebody has met; None where that is not learned.
    """
    met = recommender_head.met_items(head)
    if met is None or own is None:
        return seen
    unmet = ~met.index_fill(0, own, True)
    return unmet if seen is None else seen | unmet
