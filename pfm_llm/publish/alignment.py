"""The alignment of an adapter's items and tensors with another catalogue."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm.base import seeding
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.start import Start
from pfm_llm.protocol.parameters import ParameterTable, Unseen
from pfm_llm.protocol.types import Group, Tensors, in_group
from pfm_llm.publish.artefact import Artefact
from pfm_llm.text.item_keys import item_keys


@dataclass(frozen=True)
class Alignment:
    """The rows of a catalogue's items in an artefact.

    Attributes:
        rows: For each item its row in the artefact, or None if the artefact lacks it.
        num_known: Number of items of the artefact.
    """

    rows: tuple[int | None, ...]
    num_known: int

    @classmethod
    def of_equal(cls, num_items: int) -> "Alignment":
        """That of an artefact's own catalogue."""
        return cls(tuple(range(num_items)), num_items)

    @property
    def num_kept(self) -> int:
        """Number of items whose parameters are kept."""
        return sum(row is not None for row in self.rows)

    def new_items(self, unmet: np.ndarray | None) -> np.ndarray:
        """Which items nobody in the federation has met, bool [I].

        Args:
            unmet: The items that training learned to be so, from `unmet_items`; None: it did not
                learn that. Then they are the items that the adapter was not trained on.
        """
        return np.array([row is None for row in self.rows], dtype=bool) if unmet is None else unmet

    def describe(self) -> str:
        """A sentence on the items that are kept, dropped and new."""
        new, dropped = len(self.rows) - self.num_kept, self.num_known - self.num_kept
        return (
            f"{self.num_kept} of the adapter's {self.num_known} items are in this catalogue; the "
            f"biases and embeddings of {dropped} others are dropped, and {new} items that it "
            "never saw start from their text alone"
        )


def align_items(known: Sequence[str], wanted: Sequence[str]) -> Alignment:
    """Find the items of a catalogue, by key, in an artefact's.

    Args:
        known: Keys of the artefact's items.
        wanted: Keys of the catalogue's items.
    """
    row_of = {key: row for row, key in enumerate(known)}
    return Alignment(tuple(row_of.get(key) for key in wanted), len(known))


def aligned_tensors(
    tensors: Tensors, alignment: Alignment, table: ParameterTable
) -> dict[str, torch.Tensor]:
    """Shared tensors for another catalogue: rows that belong to items follow their items.

    A new item gets the row of each tensor's `Unseen`. Its text alone then decides its rank. Where
    all items are new (and there alone: a single known item tells some apart), rows of a mean in a
    basis are drawn around it: equal rows would tell no item from another, and no gradient would
    reach what weighs them, whose rows are zero. Tensors whose rows items share stay as they are: an
    item finds its vectors by its codes.

    Args:
        tensors: Shared tensors over the artefact's items.
        alignment: From `align_items`.
        table: The table of the artefact, which knows the tensors with a row per item.
    """
    aligned = dict(tensors)
    rows = torch.tensor([-1 if row is None else row for row in alignment.rows])
    for name in table.per_item:
        if name not in tensors:
            continue
        old, unseen = tensors[name], table[name].unseen
        default = old.mean(0) if unseen is Unseen.MEAN else torch.zeros(old.shape[1:])
        new = default.expand(len(rows), *old.shape[1:]).clone()
        if alignment.num_kept == 0 and default.any() and in_group(name, Group.BASIS):
            noise = torch.randn(new.shape, generator=seeding.generator(0, f"alignment/{name}"))
            new += noise * old.std(0, correction=0)
        new[rows >= 0] = old[rows[rows >= 0]]
        aligned[name] = new
    return aligned


def start_from(artefact: Artefact, catalogue: Catalogue) -> tuple[Start, Alignment]:
    """The start of a model over a catalogue from an adapter, and the alignment of both.

    Raises:
        ArtefactError: The adapter's files are not those of its manifest's settings.
        CorruptFileError: A file is damaged.
    """
    manifest, (tensors, normalisers) = artefact.manifest, artefact.contents()
    alignment = align_items(artefact.item_keys(), item_keys(catalogue, artefact.prompt()))
    start = Start(
        origin=artefact.origin,
        base_name=manifest.base.name,
        weights_hash=manifest.base.weights_sha256,
        tokenizer_hash=manifest.base.tokenizer_sha256,
        prompt=manifest.prompt,
        prompt_hash=manifest.prompt_sha256,
        normalisers=normalisers,
        item_encoder=manifest.item_encoder_sha256,
        tensors=aligned_tensors(tensors, alignment, artefact.table()),
        settings=manifest.model_dump(mode="json", include={"adapters", "head", "items"}),
        codes=manifest.head.codes,
        centroids=artefact.code_centroids(),
        knows_items=alignment.num_kept > 0,
    )
    return start, alignment
