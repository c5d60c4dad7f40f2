"""Codes: what is learned for an item as a sum of vectors that many items share.

With ``head.item_ids: codes`` no shared tensor has a row for each item, so a message does not grow
with the catalogue. A tensor that had a row for each item has V rows instead, one a code vector, and

    row_i = sum_k table[c_ik]

with K codes c_ik of an item, each from a book of its own. A book is a range of the V rows:

- ``text_books``: residual k-means on the whitened texts. The nearest centroid in the first book is
  the first code; what is left of the text has its nearest centroid in the second book, and so on.
  The centroids are fitted once on a catalogue and travel with the adapter, as the whitening does.
  An item of another catalogue gets the codes of its text.
- ``hash_books``: a hash of the item's key (`text.item_keys`). The same item has the same code in
  every catalogue and on every machine. Two items may share a vector, and hardly ever all of them
  (the hashing trick, Weinberger et al. 2009, arXiv 0902.2206; hash embeddings, Svenstrup et al.
  2017, arXiv 1709.03933). A sign from the hash, as in a count sketch, did not help (docs/log).

With ``head.item_met`` an item that nobody has met has the vectors of its text alone. Which items
somebody has met is told by a Bloom filter (Bloom 1970): 3 entries of an item, each in a book of its
own. A client raises the lowest entries of its items, and an item counts as met when all of its
entries are above zero. So a met item always counts as met. An item that nobody has met rarely does,
as long as a book has several times as many entries as there are met items.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from pfm_llm.base import seeding
from pfm_llm.base.errors import ArtefactError, DataError
from pfm_llm.config.model import CodesConfig
from pfm_llm.model.head import ITEM_MET
from pfm_llm.protocol.parameters import Parameter

MET_BOOKS = 3
TEXT_DIM = 64
"""Codes of text follow from so many dimensions of the whitened text, those of the most variance."""
_STEPS, _MOST_FITTED, _AT_ONCE = 25, 1 << 16, 1 << 12
"""Of k-means: its steps; the items that it is fitted to, at most; the items of one block."""


def num_vectors(config: CodesConfig) -> int:
    """V, the code vectors of all books."""
    return config.text_books * config.text_size + config.hash_books * config.hash_size


def coded(parameter: Parameter, config: CodesConfig) -> Parameter:
    """A tensor with a row for each code vector, of a tensor that was declared for V items.

    Rows are drawn smaller, so that a sum of K of them is drawn as a row of an item is.
    """
    if parameter.name == ITEM_MET:
        num_entries = MET_BOOKS * config.met_size
        return replace(parameter, shape=(num_entries,), per_item=False)
    share = (config.text_books + config.hash_books) ** -0.5

    def draw() -> torch.Tensor:
        return parameter.initial() * share

    init = None if parameter.init is None else draw
    return replace(parameter, init=init, per_item=False, per_code=True)


@dataclass(frozen=True)
class ItemCodes:
    """The codes of a catalogue.

    Attributes:
        columns: int64 [I, K], the rows of each item in a table of V code vectors.
        num_text: How many of the K codes, the first ones, follow from the text.
        met: int64 [I, 3], the entries of each item in the filter of met items.
        centroids: float32 [T, S, w], of the books of texts; None without such books.
        names: The tensors with a row for each code vector.
    """

    columns: torch.Tensor
    num_text: int
    met: torch.Tensor
    centroids: torch.Tensor | None = None
    names: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "ItemCodes":
        """The same codes on another device."""
        return replace(self, columns=self.columns.to(device), met=self.met.to(device))

    def identity(self) -> str:
        """SHA-256, in hex, over all codes: whoever trains together must agree on them."""
        found = hashlib.sha256()
        for values in (self.columns, self.met):
            found.update(str(tuple(values.shape)).encode() + values.cpu().numpy().tobytes())
        return found.hexdigest()

    def rows(self, table: torch.Tensor, met: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of all items, float32 [I, ...].

        Args:
            table: float32 [V, ...].
            met: bool [I]; codes of keys count for these items alone. None: for all.
        """
        flat, counts = table.reshape(len(table), -1), None
        if met is not None:
            is_text = torch.arange(self.columns.shape[1], device=met.device) < self.num_text
            counts = (is_text | met[:, None]).to(table.dtype)
        summed = F.embedding_bag(self.columns, flat, mode="sum", per_sample_weights=counts)
        return summed.view(-1, *table.shape[1:])

    def expanded(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One client's tensors, with a row for each item in place of one for each code vector.

        The entry of an item in ``head.item_met`` is the lowest of its entries in the filter. Its
        gradient is shared among those that are lowest, so among all that are still zero.

        Args:
            own: One client's shared tensors; others are kept as they are.
        """
        found, met = dict(own), None
        if ITEM_MET in own:
            found[ITEM_MET] = own[ITEM_MET][self.met].amin(1)
            met = found[ITEM_MET].detach() > 0
        found |= {name: self.rows(own[name], met) for name in self.names if name in own}
        return found

    def expanded_clients(
        self, owns: Sequence[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """`expanded` for each client; clients with one copy of the tensors share the sums too."""
        names = [*self.names, ITEM_MET]
        ours = [[own[name] for name in names if name in own] for own in owns]
        places = {tuple(tensor.data_ptr() for tensor in one) for one in ours}
        if len(places) == 1 and not any(tensor.requires_grad for tensor in ours[0]):
            whole = self.expanded({name: owns[0][name] for name in names if name in owns[0]})
            return [own | whole for own in owns]
        return [self.expanded(own) for own in owns]


def make_codes(
    config: CodesConfig,
    keys: Sequence[str],
    texts: torch.Tensor,
    centroids: torch.Tensor | None = None,
    names: tuple[str, ...] = (),
    text_codes: torch.Tensor | None = None,
) -> ItemCodes:
    """The codes of a catalogue.

    Args:
        config: Number and size of the books.
        keys: A key per item; see `text.item_keys`.
        texts: float32 [I, D], whitened.
        centroids: Those of the adapter to start from; None: they are fitted to the texts.
        names: The tensors with a row for each code vector.
        text_codes: The codes of the texts, int64 [I, T], where another machine has chosen them;
            None: they follow from the texts here.

    Raises:
        DataError: A book of texts has more vectors than the catalogue has different texts.
        ArtefactError: The centroids or the codes are of other books, or of texts of another width.
    """
    texts = texts.detach().cpu()[:, :TEXT_DIM].double()
    if centroids is None:
        centroids = _fitted(texts, config)
    elif tuple(centroids.shape) != (wanted := centroid_shape(config, texts.shape[1])):
        raise ArtefactError(
            f"the centroids of the codes are {list(centroids.shape)}, and head.codes with texts of "
            f"{texts.shape[1]} dimensions needs {list(wanted)}; set head.codes, head.dim and "
            "items.encoder as the adapter has them"
        )
    if text_codes is None:
        of_text = _text_codes(texts, centroids, config)
    else:
        of_text = _checked(text_codes, len(texts), config)
    drawn = _drawn(keys, config.hash_books + MET_BOOKS)
    of_key, of_met = drawn[:, : config.hash_books], drawn[:, config.hash_books :]
    hashed = _in_books(of_key, config.hash_size, config.text_books * config.text_size)
    return ItemCodes(
        columns=torch.cat([of_text, hashed], 1),
        num_text=config.text_books,
        met=_in_books(of_met, config.met_size),
        centroids=centroids if config.text_books else None,
        names=names,
    )


def centroid_shape(config: CodesConfig, dim: int) -> tuple[int, int, int]:
    """The shape of the centroids [T, S, w] where whitened texts have ``dim`` dimensions."""
    return config.text_books, config.text_size, min(TEXT_DIM, dim)


def _drawn(keys: Sequence[str], count: int) -> np.ndarray:
    """Numbers uint64 [I, count] that follow from the keys alone, equal on all machines."""
    digests = (hashlib.shake_256(f"codes/{key}".encode()).digest(8 * count) for key in keys)
    numbers = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    return numbers.reshape(len(keys), count)


def _in_books(numbers: np.ndarray, size: int, first: int = 0) -> torch.Tensor:
    """Numbers [I, n] as places in n books of a size, one after another from ``first`` on."""
    within = torch.from_numpy((numbers % np.uint64(size)).astype(np.int64))
    return within + first + size * torch.arange(within.shape[1])


def _fitted(texts: torch.Tensor, config: CodesConfig) -> torch.Tensor:
    """Centroids of texts [I, w] float64. They depend on the texts alone, and on no seed of a run.

    They are rounded to the float32 in which they are published before any code follows from them.
    """
    books = torch.zeros(centroid_shape(config, texts.shape[1]))
    if not config.text_books:
        return books
    if (different := len(texts.unique(dim=0))) < config.text_size:
        raise DataError(
            f"head.codes.text_size: {config.text_size} exceeds the {different} different texts of "
            "the catalogue; lower it, or set head.codes.text_books: 0"
        )
    drawn = seeding.generator(0, "codes")
    rest = texts[torch.randperm(len(texts), generator=drawn)[:_MOST_FITTED]]
    for book in books:
        book.copy_(_k_means(rest, rest[torch.randperm(len(rest), generator=drawn)[: len(book)]]))
        rest = rest - book.double()[_nearest(rest, book)]
    return books


def _k_means(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Lloyd's algorithm on rows [I, w] from centroids [S, w]; one of no row stays as it is."""
    before = None
    for _ in range(_STEPS):
        nearest = _nearest(rows, centroids)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        counts = nearest.bincount(minlength=len(centroids))[:, None]
        sums = torch.zeros_like(centroids).index_add(0, nearest, rows)
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids


def _nearest(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest of some centroids [S, w] to each row [I, w], int64 [I]; of equals the first."""
    centroids = centroids.double()
    lengths = centroids.square().sum(1)
    found = [(lengths - 2 * part @ centroids.T).argmin(1) for part in rows.split(_AT_ONCE)]
    return torch.cat(found)


def _text_codes(texts: torch.Tensor, centroids: torch.Tensor, config: CodesConfig) -> torch.Tensor:
    """The codes int64 [I, T] of texts [I, w]."""
    codes, rest = [torch.empty(len(texts), 0, dtype=torch.int64)], texts
    for number, book in enumerate(centroids):
        nearest = _nearest(rest, book)
        rest = rest - book.double()[nearest]
        codes.append(nearest[:, None] + number * config.text_size)
    return torch.cat(codes, 1)


def _checked(given: torch.Tensor, num_items: int, config: CodesConfig) -> torch.Tensor:
    """Codes of texts that another machine has chosen, each of them in its book."""
    first = torch.arange(config.text_books) * config.text_size
    fits = given.dtype == torch.int64 and given.shape == (num_items, config.text_books)
    if not fits or not bool(((given >= first) & (given < first + config.text_size)).all()):
        raise ArtefactError(
            f"the given codes of texts are not {config.text_books} places in the books of "
            f"head.codes for each of {num_items} items; take those of a server that has the same "
            "config and catalogue"
        )
    return given
