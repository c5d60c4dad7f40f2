"""What is fitted once to the texts of a catalogue, and then given to all who train together.

Two machines that fit a whitening each do not get the same axes, even from the same texts: states in
bfloat16 differ from those in float32 by a percent, and that turns axes of similar variance. Tensors
that were trained on one set of axes mean nothing on another. Codes of texts are nearest centroids,
and a rounding may change which one is nearest. So one side fits them, and the others take them.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

import torch

from pfm_llm.base.errors import ArtefactError
from pfm_llm.config.model import CodesConfig
from pfm_llm.model.items.codes import ItemCodes
from pfm_llm.model.items.vectors import ItemStates
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.types import Tensors

_MEAN, _BASIS = "whitening.mean", "whitening.basis"
_ITEM_MEAN, _ITEM_BASIS = "whitening.items.mean", "whitening.items.basis"
_CENTROIDS, _TEXT_CODES = "codes.centroids", "codes.of_text"


@dataclass(frozen=True)
class FittedTexts:
    """The whitenings of a catalogue's texts, and the codes that follow from them.

    Attributes:
        normaliser: The whitening of user states.
        item_normaliser: That of item vectors; the same object where both share a space.
        centroids: Of the books of texts, float32 [T, S, w]; None without such books.
        text_codes: The codes of each item's text, int64 [I, T]; None without such books.
    """

    normaliser: Normaliser
    item_normaliser: Normaliser
    centroids: torch.Tensor | None = None
    text_codes: torch.Tensor | None = None

    @classmethod
    def of(
        cls, normaliser: Normaliser, item_normaliser: Normaliser, codes: ItemCodes | None
    ) -> Self:
        """What a model was built with.

        Args:
            normaliser: Its whitening of user states.
            item_normaliser: Its whitening of item vectors.
            codes: Its codes; None: each item has rows of its own.
        """
        if codes is None or codes.centroids is None:
            return cls(normaliser, item_normaliser)
        of_text = codes.columns[:, : codes.num_text].contiguous()
        return cls(normaliser, item_normaliser, codes.centroids, of_text)

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Self:
        """The inverse of `tensors`; other tensors are passed over.

        Raises:
            ArtefactError: The whitening is missing.
        """
        if _MEAN not in tensors or _BASIS not in tensors:
            raise ArtefactError("the fitted tensors hold no whitening; take those of the server")
        normaliser = own = Normaliser(tensors[_MEAN], tensors[_BASIS])
        if _ITEM_MEAN in tensors and _ITEM_BASIS in tensors:
            own = Normaliser(tensors[_ITEM_MEAN], tensors[_ITEM_BASIS])
        return cls(normaliser, own, tensors.get(_CENTROIDS), tensors.get(_TEXT_CODES))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, on the CPU."""
        found = {_MEAN: self.normaliser.mean, _BASIS: self.normaliser.basis}
        if self.item_normaliser is not self.normaliser:
            found |= {_ITEM_MEAN: self.item_normaliser.mean}
            found |= {_ITEM_BASIS: self.item_normaliser.basis}
        if self.centroids is not None and self.text_codes is not None:
            found |= {_CENTROIDS: self.centroids, _TEXT_CODES: self.text_codes}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def whitenings(self, states: ItemStates) -> tuple[Normaliser, Normaliser]:
        """The whitenings of user states and of items.

        Args:
            states: Of the same texts, as they are read here.

        Raises:
            ArtefactError: The states have another width.
        """
        pairs = (self.normaliser, states.prompt), (self.item_normaliser, states.items)
        for normaliser, own in pairs:
            width = own.shape[-1]
            found = [TensorSpec.of(tensor) for tensor in (normaliser.mean, normaliser.basis)]
            if found != [TensorSpec((width,)), TensorSpec((width, width))]:
                raise ArtefactError(
                    f"the whitening is {found[0]} and {found[1]}, and states have {width} numbers "
                    "here; use the backbone and the items.encoder of the server"
                )
        return self.normaliser, self.item_normaliser

    def code_centroids(self, codes: CodesConfig) -> torch.Tensor | None:
        """The centroids of the books of texts, float32 [T, S, w]; `make_codes` checks them.

        Raises:
            ArtefactError: The config has such books and there are no centroids.
        """
        if codes.text_books and (self.centroids is None or self.text_codes is None):
            raise ArtefactError("head.codes has books of texts, and the server gave no codes")
        return self.centroids


def tensors_hash(tensors: Tensors) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
