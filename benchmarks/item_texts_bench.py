"""What `benchmarks.item_texts` measures, and the rule by which it chooses."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

from pfm_llm.base.progress import Progress
from pfm_llm.config.choices import Pooling
from pfm_llm.config.model import BACKBONE_ENCODER, ItemsConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import scoring
from pfm_llm.evaluation.metrics import FloatArray
from pfm_llm.evaluation.personality.estimates import Bootstrap, estimate, user_quality
from pfm_llm.evaluation.personality.new_items import percentiles
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.items import vectors
from pfm_llm.model.items.whitening import fit_normaliser
from pfm_llm.runs.run import Corpus
from pfm_llm.text.encoding import HistoryEncoder
from pfm_llm.text.prompts import load_prompt

DIMS = (64, 128, 256, 384)
HALF_LIFE = 12.0
"""In items: the longer of the two half-lives that a head starts with."""
QUALITY = "percentile"
"""The quality by which the rule chooses."""
CONFIDENCE = 0.95

RULE = (
    "The best mean over the domains of the mean percentile over users. A setting is level with the "
    "best where the 95 % interval of the difference, paired over users, holds 0. Of the settings "
    "that are level, the one with the fewest numbers; among these, the best one."
)

Qualities = Mapping[str, FloatArray]
"""Name of a quality to a number for each user, float64 [U]; more is better."""


@dataclass(frozen=True)
class Kind:
    """A way to make a vector of an item's text.

    Attributes:
        encoder: As in ``items.encoder``.
        pooling: As in ``items.pooling``; a sentence encoder has its own.
        layers: ``all``, or ``half``: the state after the lower half of the layers. No setting
            of a run is like the latter.
    """

    encoder: str
    pooling: str = "own"
    layers: str = "all"

    def __str__(self) -> str:
        own = self.encoder if self.pooling == "own" else f"{self.encoder} {self.pooling}"
        return own if self.layers == "all" else f"{own}, {self.layers} of the layers"


SENTENCES = (Kind("minilm"),)
WHOLE = (*SENTENCES, *(Kind(BACKBONE_ENCODER, pooling.value) for pooling in Pooling))
HALF = tuple(Kind(BACKBONE_ENCODER, pooling.value, "half") for pooling in Pooling)


@dataclass(frozen=True)
class Setting:
    """A kind of vectors, whitened, of which the first ``dim`` dimensions are kept."""

    kind: Kind
    dim: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.dim}"

    @classmethod
    def of(cls, config: ExperimentConfig) -> "Setting":
        """That of a run."""
        items = config.items
        own = Kind(items.encoder, items.pooling.value) if items.is_backbone else Kind(items.encoder)
        return cls(own, config.head.dim)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Setting":
        """From `as_row`; further entries are passed over."""
        return cls(Kind(row["encoder"], row["pooling"], row["layers"]), row["dim"])

    @property
    def is_available(self) -> bool:
        """Whether a run can have it."""
        return self.kind.layers == "all"

    def as_row(self) -> dict[str, Any]:
        """Its fields in plain JSON types."""
        return {**dataclasses.asdict(self.kind), "dim": self.dim}


def item_vectors(
    kind: Kind, config: ExperimentConfig, data: Corpus, backbone: Backbone
) -> torch.Tensor:
    """Vectors of a catalogue's texts, float32 [I, w], as a run with these settings has them."""
    encoder = HistoryEncoder(
        load_prompt(config.prompt),
        data.interactions.catalogue,
        backbone.tokenizer,
        config.window,
        backbone.max_tokens,
    )
    if kind.encoder != BACKBONE_ENCODER:
        return vectors.sentence_states(ItemsConfig(encoder=kind.encoder), encoder)[0]
    pieces, pooling = encoder.catalogue_pieces(config.items.max_tokens), Pooling(kind.pooling)
    if kind.layers == "all":
        return vectors.backbone_states(backbone, pieces, pooling)
    above = backbone.decoder.config.num_hidden_layers // 2
    return vectors.kept_states(
        (*vectors.identity_of(backbone), kind.pooling, f"below {above}"),
        pieces,
        lambda: vectors.read_texts(backbone, pieces, pooling, backbone.split(above)[0]),
    )


def measure(
    states: torch.Tensor, held_out: HeldOut, what: str, dims: Sequence[int]
) -> dict[int, Qualities]:
    """How well vectors tell the held-out items, without any training.

    An item scores the cosine of its whitened vector with the fading mean of those of the history,
    in which an item that is a items old counts 2^(-a / `HALF_LIFE`).

    Args:
        states: float32 [I, w], of the texts of the catalogue.
        held_out: The queries.
        what: For the progress bar.
        dims: Kept dimensions of the whitened vectors; those above w are left out.

    Returns:
        For each of ``dims`` the qualities of the users, by ascending user.
    """
    white = fit_normaliser(states)(states)
    kept = [dim for dim in dims if dim <= white.shape[1]]
    with Progress(len(kept) * len(held_out.users), what, unit="users") as progress:
        return {dim: _qualities(F.normalize(white[:, :dim]), held_out, progress) for dim in kept}


def _qualities(texts: torch.Tensor, held_out: HeldOut, progress: Progress) -> Qualities:
    ranks, candidates = [], []
    size = scoring.queries_at_once(len(texts), 512)
    for start in range(0, len(held_out.users), size):
        some = held_out.take(range(start, min(start + size, len(held_out.users))))
        profiles = torch.stack([faded(texts[torch.from_numpy(own)]) for own in some.histories])
        ranks.append(scoring.full_ranks(profiles @ texts.T, some.histories, some.targets))
        for own, targets in zip(some.histories, some.targets, strict=True):
            candidates += [len(texts) - len(np.unique(own))] * len(targets)
        progress.update(len(some.users))
    found = np.concatenate(ranks)
    users = np.repeat(held_out.users, [len(targets) for targets in held_out.targets])
    values = {name: user_quality(name, found, users) for name in ("log_rank", "ndcg")}
    return {**values, QUALITY: percentiles(found, np.array(candidates), users)}


def faded(texts: torch.Tensor) -> torch.Tensor:
    """The weighted mean [D] of the vectors [n, D] of a history, the newest last."""
    ages = torch.arange(len(texts) - 1, -1, -1)
    weights = torch.exp2(-ages / HALF_LIFE)
    return weights @ texts / weights.sum()


def rows(domain: str, found: Mapping[Setting, Qualities]) -> list[dict[str, Any]]:
    """A row for each setting of a domain: the means over users, with their intervals."""
    return [
        {
            "domain": domain,
            **setting.as_row(),
            **{
                name: dataclasses.asdict(estimate(values, Bootstrap()))
                for name, values in own.items()
            },
        }
        for setting, own in found.items()
    ]


def choose(
    found: Mapping[str, Mapping[Setting, Qualities]], quality: str = QUALITY
) -> tuple[Setting, list[dict[str, Any]]]:
    """Apply `RULE`.

    The variance of a mean over domains is the sum of the variances of the domains' means over the
    square of their number, since their users are not the same. The interval is by the normal
    distribution.

    Args:
        found: Per domain and setting the qualities of its users. A setting that is not measured
            in all domains, or that no run can have, is left out.
        quality: The quality to choose by.

    Returns:
        The choice, and a row for each setting, the best first: its mean over the domains, its
        difference to the best with interval, and whether it is level with it.
    """
    first, *others = found.values()
    common = [s for s in first if s.is_available and all(s in other for other in others)]
    means = {
        s: statistics.fmean(float(own[s][quality].mean()) for own in found.values()) for s in common
    }
    best = max(common, key=means.__getitem__)
    half = float(special.ndtri((1 + CONFIDENCE) / 2))
    table, level = [], []
    for setting in sorted(common, key=means.__getitem__, reverse=True):
        gaps = [own[setting][quality] - own[best][quality] for own in found.values()]
        error = float(sum(gap.var(ddof=1) / len(gap) for gap in gaps)) ** 0.5 / len(gaps)
        value = means[setting] - means[best]
        high = value + half * error
        if high >= 0:
            level.append(setting)
        below = {"value": value, "ci_low": value - half * error, "ci_high": high}
        mean = {"mean": means[setting], "below_best": below, "is_level": setting in level}
        table.append({**setting.as_row(), **mean})
    return min(level, key=lambda setting: (setting.dim, -means[setting])), table
