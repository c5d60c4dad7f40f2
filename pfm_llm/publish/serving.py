"""What a published adapter needs to serve: its items, and the settings of its model."""

from pathlib import Path
from typing import TypedDict

from pfm_llm.base.errors import ArtefactError, DataError
from pfm_llm.config.choices import Ablation
from pfm_llm.config.data import EMBEDDED_SOURCES
from pfm_llm.config.model import ItemsConfig
from pfm_llm.config.running import InitFromConfig
from pfm_llm.config.schema import BackboneConfig, ExperimentConfig, FederationConfig
from pfm_llm.data import sources
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.backbone import EMBEDDED
from pfm_llm.model.items.sentence_encoder import EMBEDDED_ENCODERS
from pfm_llm.publish.artefact import Artefact, prompt_file


def load_catalogue(artefact: Artefact, source: str | None) -> Catalogue:
    """The items that an adapter is to rank.

    Args:
        artefact: The adapter.
        source: See `sources.load_catalogue`; None: the items that it was trained on.

    Raises:
        DataError: The items that it was trained on are not at hand, or the source is none.
    """
    trained_on = artefact.manifest.data_source
    if source is None and trained_on not in EMBEDDED_SOURCES:
        raise DataError(
            f"{artefact.origin} was trained on {trained_on!r}, whose items are not in its folder; "
            "pass catalogue: a CSV, TSV or Parquet file with item_id and title"
        )
    return sources.load_catalogue(source or trained_on)


class Bases(TypedDict, total=False):
    """The frozen models that a published adapter stands on, where they are on this machine.

    Attributes:
        backbone: Name, Hub id or folder of the base model; None: as the manifest names it.
        item_encoder: Name, Hub id or folder of the encoder of item texts; None: as the manifest
            names it.
        allow_base_mismatch: Go on although the base weights are others.
    """

    backbone: str | None
    item_encoder: str | None
    allow_base_mismatch: bool


def serving_config(
    artefact: Artefact,
    backbone: str | None = None,
    item_encoder: str | None = None,
    allow_base_mismatch: bool = False,
) -> ExperimentConfig:
    """The settings under which the adapter's tensors have their meaning.

    What a manifest does not hold stands at its default, and is read by no recommender.

    Args:
        artefact: The adapter.
        backbone: See `Bases`.
        item_encoder: See `Bases`.
        allow_base_mismatch: See `Bases`.

    Raises:
        ArtefactError: The manifest names a base or an encoder that is nobody else's, or a path; or
            the adapter was trained on random weights or shuffled texts.
    """
    manifest = artefact.manifest
    if manifest.ablation in (Ablation.RANDOM_WEIGHTS, Ablation.SHUFFLED_TEXTS):
        raise ArtefactError(
            f"{artefact.origin} was trained with ablation: {manifest.ablation}, whose random draw "
            "is not published; open the run itself, or train without it"
        )
    name = backbone or manifest.base.embedded or manifest.base.name
    if backbone is None and not _is_portable(name, manifest.base.embedded):
        raise ArtefactError(
            f"{artefact.origin}: its manifest names a base model {name!r}, which is neither "
            "embedded nor a Hub id; pass backbone: the folder or Hub id of that model"
        )
    if name == manifest.base.name and "/" not in name and not Path(name).exists():
        raise ArtefactError(
            f"{artefact.origin} was trained on a local model called {name!r}; pass backbone: the "
            "folder or Hub id of that model"
        )
    revision = None if backbone else manifest.base.revision
    return ExperimentConfig.model_construct(
        name=manifest.name,
        prompt=str(artefact.folder / prompt_file(manifest.prompt)),
        tasks=manifest.tasks,
        window=manifest.window,
        items=_items(artefact, item_encoder),
        ablation=manifest.ablation,
        adapters=manifest.adapters,
        head=manifest.head,
        backbone=BackboneConfig(name=name, revision=revision, dtype=manifest.base.dtype),
        federation=FederationConfig(cohort_size=1),  # one client: the user
        init_from=InitFromConfig(adapter=artefact.origin, allow_base_mismatch=allow_base_mismatch),
    )


def _items(artefact: Artefact, encoder: str | None) -> ItemsConfig:
    """How items become vectors, with an encoder that can be had on this machine."""
    items, name = artefact.manifest.items, artefact.manifest.items.encoder
    if encoder is not None:
        return items.model_copy(update={"encoder": encoder, "revision": None})
    if items.is_backbone or name in EMBEDDED_ENCODERS:
        return items
    if not _is_portable(name, None) or ("/" not in name and not Path(name).exists()):
        raise ArtefactError(
            f"{artefact.origin} was trained with a local encoder of item texts called {name!r}; "
            "pass item_encoder (--item-encoder): the folder or Hub id of that encoder"
        )
    return items


def _is_portable(name: str, embedded: str | None) -> bool:
    """Whether a base model's name is embedded, a Hub id or a plain name; a path is not."""
    if embedded is not None:
        return name in EMBEDDED
    return name.count("/") < 2 and all(part.strip(".~") for part in name.split("/"))
