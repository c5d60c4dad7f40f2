"""The difference between two versions of a shared adapter.

An adapted module computes with W + s B A, with s the scale of the LoRA. So the effective change of
its weights is the difference of two such products. They are never formed: with A and B padded with
zeros to one rank,

    s' B' A' - s B A = [s' B', s' B' - s B] [A' - A; A] = P Q,

and the squared Frobenius norm of P Q is the sum over (PᵀP) * (QQᵀ), two small Gram matrices.
With differences of the factors, close versions lose no precision, and equal versions give zero.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pfm_llm.config.settings import leaves
from pfm_llm.protocol.types import Group, Tensors, in_group, lora_modules, lora_name
from pfm_llm.publish.alignment import align_items
from pfm_llm.publish.artefact import Artefact
from pfm_llm.publish.manifest import Metric

_LAYER = re.compile(r".*?\.\d+(?=\.|$)")
_NOT_SETTINGS = {"files", "parents", "metrics", "modules"}
_IN_BOTH = {"adapters", "head", "items", "ablation", "window", "prompt", "name"}


@dataclass(frozen=True)
class Change:
    """The size of one change.

    Attributes:
        name: Name of a module, a layer or a tensor.
        norm: Frobenius norm of the change; None if the two cannot be compared.
        older_norm: Frobenius norm of the older value.
        relative: The ratio of both norms; None if it is undefined.
        note: A remark on the comparison; may be empty.
    """

    name: str
    norm: float | None
    older_norm: float
    relative: float | None
    note: str = ""

    @classmethod
    def of(cls, name: str, norm: float | None, older_norm: float, note: str = "") -> "Change":
        """A change with the ratio of the two norms."""
        relative = norm / older_norm if norm is not None and older_norm > 0 else None
        return cls(name, norm, older_norm, relative, note)


@dataclass(frozen=True)
class MetricChange:
    """A figure of the evaluation, before and after; None if it was not measured."""

    mode: str
    metric: str
    older: Metric | None
    newer: Metric | None

    @property
    def difference(self) -> float | None:
        """Newer minus older."""
        if self.older is None or self.newer is None:
            return None
        return self.newer.value - self.older.value


@dataclass(frozen=True)
class SettingChange:
    """A setting, before and after; None if it was not set."""

    name: str
    older: Any
    newer: Any


@dataclass(frozen=True)
class VersionDiff:
    """All changes between two versions.

    Attributes:
        older, newer: The origins of the two versions.
        modules: Effective weight change of each adapted module.
        layers: The same, modules of a layer taken together.
        tensors: Change of each tensor of the head and of a shared basis; rows that belong to
            items are compared item by item.
        num_items: Items that both know.
        num_new, num_gone: Items that only the newer, only the older one knows.
        metrics: Figures of the evaluation.
        settings: Those that differ.
    """

    older: str
    newer: str
    modules: tuple[Change, ...]
    layers: tuple[Change, ...]
    tensors: tuple[Change, ...]
    num_items: int
    num_new: int
    num_gone: int
    metrics: tuple[MetricChange, ...]
    settings: tuple[SettingChange, ...]


def diff_versions(older: Artefact, newer: Artefact) -> VersionDiff:
    """Compare two shared adapters, whose ranks, modules and catalogues may differ.

    Args:
        older: The older version.
        newer: The newer version.

    Raises:
        ArtefactError: The files of one of them are not those of its manifest's settings.
        CorruptFileError: A file of one of them is damaged.
    """
    before, after = older.shared_tensors(), newer.shared_tensors()
    rows = align_items(older.item_keys(), newer.item_keys()).rows
    common = [(row, place) for place, row in enumerate(rows) if row is not None]
    modules = tuple(_module_changes(older, newer, before, after))
    return VersionDiff(
        older=older.origin,
        newer=newer.origin,
        modules=modules,
        layers=tuple(_layer_changes(modules)),
        tensors=tuple(_tensor_changes(before, after, common, newer.table().per_item)),
        num_items=len(common),
        num_new=newer.manifest.num_items - len(common),
        num_gone=older.manifest.num_items - len(common),
        metrics=tuple(_metric_changes(older.manifest.metrics, newer.manifest.metrics)),
        settings=tuple(_setting_changes(_settings(older), _settings(newer))),
    )


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm of ``left @ right`` from their Gram matrices, without forming the product."""
    squared = ((left.T @ left) * (right @ right.T)).sum().item()
    return math.sqrt(max(squared, 0.0))  # rounding may leave a little less than nothing


def _module_changes(
    older: Artefact, newer: Artefact, before: Tensors, after: Tensors
) -> Iterator[Change]:
    for module in sorted({*lora_modules(before), *lora_modules(after)}, key=_in_order):
        old, new = _factors(older, before, module), _factors(newer, after, module)
        note = "new" if old is None else "gone" if new is None else ""
        b_old, a_old = old or [torch.zeros_like(factor) for factor in new or ()]
        b_new, a_new = new or [torch.zeros_like(factor) for factor in old or ()]
        was = product_norm(b_old, a_old)
        if (b_old.shape[0], a_old.shape[1]) != (b_new.shape[0], a_new.shape[1]):
            yield Change.of(module, None, was, "of another shape")
            continue
        rank = max(len(a_old), len(a_new))
        b_old, b_new = (F.pad(b, (0, rank - b.shape[1])) for b in (b_old, b_new))
        a_old, a_new = (F.pad(a, (0, 0, 0, rank - len(a))) for a in (a_old, a_new))
        left = torch.cat([b_new, b_new - b_old], dim=1)
        right = torch.cat([a_new - a_old, a_old])
        yield Change.of(module, product_norm(left, right), was, note)


def _factors(
    artefact: Artefact, tensors: Tensors, module: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scaled B and A in float64; None where the module is not adapted."""
    if lora_name(module, "A") not in tensors:
        return None
    lora = artefact.manifest.adapters.shared
    b, a = tensors[lora_name(module, "B")], tensors[lora_name(module, "A")]
    return b.double() * lora.scale, a.double()


def _in_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 9 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _layer_changes(modules: Iterable[Change]) -> Iterator[Change]:
    layers: dict[str, list[Change]] = defaultdict(list)
    for change in modules:
        layer = _LAYER.match(change.name)
        layers[layer[0] if layer else change.name].append(change)
    for name, changes in layers.items():
        norms = [change.norm for change in changes if change.norm is not None]
        norm = math.hypot(*norms) if len(norms) == len(changes) else None
        older_norm = math.hypot(*(change.older_norm for change in changes))
        yield Change.of(name, norm, older_norm, "" if norm is not None else "of another shape")


def _tensor_changes(
    before: Tensors,
    after: Tensors,
    common: list[tuple[int, int]],
    per_item: Collection[str],
) -> Iterator[Change]:
    """Changes of all tensors except the LoRA; ``common``: the rows of items in both versions."""
    names = {name for name in (*before, *after) if not in_group(name, Group.LORA)}
    for name in sorted(names):
        if name not in before:
            yield Change.of(name, _norm(after[name]), 0.0, "new")
            continue
        old = before[name]
        if name not in after:
            yield Change.of(name, _norm(old), _norm(old), "gone")
            continue
        new, note = after[name], ""
        if name in per_item:
            kept = torch.tensor(common, dtype=torch.int64).reshape(-1, 2)
            old, new = old[kept[:, 0]], new[kept[:, 1]]
            note = f"over the {len(common)} items that both know"
        if old.shape != new.shape:
            yield Change.of(name, None, _norm(old), "of another shape")
            continue
        yield Change.of(name, _norm(new.double() - old.double()), _norm(old), note)


def _norm(tensor: torch.Tensor) -> float:
    return tensor.double().norm().item()


def _metric_changes(older: Iterable[Metric], newer: Iterable[Metric]) -> Iterator[MetricChange]:
    before = {(metric.mode, metric.metric): metric for metric in older}
    after = {(metric.mode, metric.metric): metric for metric in newer}
    for key in {**before, **after}:
        yield MetricChange(*key, older=before.get(key), newer=after.get(key))


def _settings(artefact: Artefact) -> dict[str, object]:
    """Dotted key to value, from the manifest and, if there is one, the training config."""
    manifest = artefact.manifest.model_dump(mode="json", exclude=_NOT_SETTINGS)
    settings = leaves(manifest)
    tree = artefact.training_settings()
    own = {key: value for key, value in tree.items() if key not in _IN_BOTH}
    return settings | leaves(own, "training") if own else settings


def _setting_changes(
    older: Mapping[str, object], newer: Mapping[str, object]
) -> Iterator[SettingChange]:
    for name in sorted({*older, *newer}):
        if older.get(name) != newer.get(name):
            yield SettingChange(name, older.get(name), newer.get(name))
