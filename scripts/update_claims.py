"""Rebuild results/claims.json, the figures of README and docs, from results (make claims).

Every figure that README and docs state in prose is a claim. ``results/claims.yaml`` gives the place
of each. ``make claims`` looks the figures up with
`build_claims` and writes them to ``results/claims.json``. Nobody types a figure::

    sources:
      films:
        files: results/ml100k-next/full/pfm-fedsgd-s*.json    # a file for each seed
        command: accelerate launch scripts/benchmark.py --suite ...
    claims:
      gain.films.ndcg:
        from: films
        row: {metric: gain_ndcg, k: 10}   # the row or comparison with these fields
        unit: NDCG@10
        bar: ci_low > 0                   # the claimed bound; optional
        note: The gain from the private part.

Instead of ``row``, ``path: [costs, bytes_up]`` names a number by its keys; ``per`` (a number or
a second path) divides it and ``scale`` multiplies it. Over several files, a figure is the mean and
its interval is over users and seeds, as in the tables. ``least: ci_low`` takes the row with the
lowest lower end among the matching rows of all files; a field may then be a pattern such as
``harm_*_decile_*``.

Nothing here imports torch.
"""

import argparse
import fnmatch
import functools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.cli.start import run_safely

_ROOT = Path(__file__).resolve().parents[1]

_ID = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_BAR = re.compile(r"(?:(value|ci_low|ci_high) )?(>=|<=|>|<) (-?\d+(?:\.\d+)?)")
_KEYS = {"from", "row", "path", "per", "scale", "least", "unit", "bar", "note"}
_CONFIDENCE = 0.95
_USUAL = {"split": "test", "candidates": "full"}


@dataclass(frozen=True)
class Claim:
    """A figure and where it comes from.

    Attributes:
        id: Dotted name, such as ``gain.films.ndcg``.
        value: The figure, a mean over seeds.
        ci_low: Lower end of its 95 % interval, over users and seeds; None for a figure without one.
        ci_high: Upper end of it.
        unit: Such as ``NDCG@10``, ``log-ranks`` or ``MB``.
        bar: The claimed bound, such as ``ci_low > 0``; None without one.
        holds: Whether the figure meets the bar; None without a bar.
        command: The command that measures it again.
        file: The result file, or the pattern of several.
        commit: The commits of the measurements, separated by commas.
        seeds: The seeds of the mean.
        note: The figure in words.
    """

    id: str
    value: float
    ci_low: float | None
    ci_high: float | None
    unit: str
    bar: str | None
    holds: bool | None
    command: str
    file: str
    commit: str
    seeds: tuple[int, ...]
    note: str


@dataclass(frozen=True)
class _Figure:
    value: float
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class _Row:
    value: float
    ci_low: float
    ci_high: float


def build_claims(root: Path) -> list[Claim]:
    """Look up every claim of ``results/claims.yaml``.

    Args:
        root: The repository.

    Returns:
        The claims in the order of the file.

    Raises:
        DataError: A claim is not well-formed, its file is missing, or its row is not in the file.
        CorruptFileError: A result file is not JSON.
    """
    tree = yaml.safe_load((root / "results" / "claims.yaml").read_text())
    contents = {
        name: {path: _json(path) for path in sorted(root.glob(source["files"]))}
        for name, source in tree["sources"].items()
    }
    claims = []
    for name, spec in tree["claims"].items():
        _check(name, spec, contents)
        source, files = tree["sources"][spec["from"]], list(contents[spec["from"]].values())
        try:
            figure = _figure(spec, files)
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"claim {name}: {error} in {source['files']}") from error
        commits = {file["environment"]["git"]["commit"][:12] for file in files}
        claims.append(
            Claim(
                id=name,
                **vars(figure),
                unit=spec["unit"],
                bar=spec.get("bar"),
                holds=holds(spec["bar"], figure) if "bar" in spec else None,
                command=source["command"],
                file=source["files"],
                commit=", ".join(sorted(commits)),
                seeds=tuple(sorted({file["environment"]["seed"] for file in files})),
                note=spec["note"],
            )
        )
    return claims


def claims_text(claims: Sequence[Claim]) -> str:
    """The content of ``results/claims.json``."""
    return json.dumps({"rows": [vars(claim) for claim in claims]}, indent=2) + "\n"


def read_claims(root: Path) -> dict[str, Claim]:
    """Id to claim, from ``results/claims.json``.

    Raises:
        DataError: The file does not exist.
        CorruptFileError: The file does not have the format of `claims_text`.
    """
    path = root / "results" / "claims.json"
    if not path.is_file():
        raise DataError(f"there is no {path}; run make claims")
    try:
        rows = [Claim(**{**row, "seeds": tuple(row["seeds"])}) for row in _json(path)["rows"]]
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} holds no claims ({error}); run make claims") from error
    return {claim.id: claim for claim in rows}


def is_stale(root: Path, claims: Sequence[Claim]) -> bool:
    """Whether ``results/claims.json`` has other claims than these.

    Figures may differ in the last digits, in which versions of scipy differ.

    Raises:
        DataError, CorruptFileError: See `read_claims`.
    """
    committed = list(read_claims(root).values())
    alike = len(committed) == len(claims) and all(map(_is_alike, committed, claims))
    return not alike


def _is_alike(one: Claim, other: Claim) -> bool:
    pairs = ((getattr(one, field), getattr(other, field)) for field in vars(one))
    return all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
        for a, b in pairs
    )


def holds(bar: str, figure: "_Figure | _Row | Claim") -> bool:
    """Whether a figure meets a bar: ``> 0`` bounds the value, ``ci_low > 0`` the lower end.

    Raises:
        DataError: The bar cannot be parsed, or it bounds an interval that the figure lacks.
    """
    match = _BAR.fullmatch(bar)
    field = match[1] or "value" if match else ""
    number = getattr(figure, field) if match else None
    if match is None or number is None:
        raise DataError(f"bar {bar!r}: write '>= 0.3', or 'ci_low > 0' for a figure with interval")
    limit = float(match[3])
    met = {">": number > limit, "<": number < limit, ">=": number >= limit, "<=": number <= limit}
    return bool(met[match[2]])


def _check(name: str, spec: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """Raise a `DataError` for a claim that is not well-formed."""
    if not _ID.fullmatch(name):
        raise DataError(f"claim {name}: an id is dotted lower-case words, such as next.films.pfm")
    if unknown := spec.keys() - _KEYS:
        raise DataError(f"claim {name}: unknown keys {sorted(unknown)}; valid: {sorted(_KEYS)}")
    if missing := {"from", "unit", "note"} - spec.keys():
        raise DataError(f"claim {name} lacks {sorted(missing)}")
    if ("row" in spec) == ("path" in spec):
        raise DataError(f"claim {name}: give either row or path")
    if not contents.get(spec["from"]):
        raise DataError(f"claim {name}: source {spec['from']} is unknown or has no files")


def _figure(spec: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> _Figure | _Row:
    from pfm_llm.evaluation.personality.significance import over_seeds

    if "path" in spec:
        scale, per = spec.get("scale", 1.0), spec.get("per", 1.0)
        return _Figure(
            statistics.fmean(
                _at(file, spec["path"]) * scale / (_at(file, per) if isinstance(per, list) else per)
                for file in files
            )
        )
    found = [_rows(file, {**_USUAL, **spec["row"]}) for file in files]
    if "least" in spec:
        return min((row for rows in found for row in rows), key=lambda r: getattr(r, spec["least"]))
    for rows in found:
        if len(set(rows)) != 1:
            raise LookupError(f"{len(rows)} rows instead of one for {spec['row']}")
    evaluation = files[0].get("config", {}).get("evaluation", {})
    confidence = evaluation.get("confidence", _CONFIDENCE)  # not every benchmark has a config
    whole = over_seeds([own[0] for own in found], confidence)
    return _Row(whole.value, whole.low, whole.high)


def _rows(file: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[_Row]:
    """The figures of all rows and comparisons with the wanted fields."""
    return [
        _Row(row["value"], row["ci_low"], row["ci_high"])
        for row in [*file["rows"], *file.get("comparisons", [])]
        if all(fnmatch.fnmatchcase(str(row[key]), str(value)) for key, value in wanted.items())
    ]


def _at(tree: Any, path: Sequence[Any]) -> float:
    for key in path:
        tree = tree[key]
    return float(tree)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON: {error}") from error


def update(arguments: argparse.Namespace) -> None:
    claims = build_claims(_ROOT)
    if not arguments.check:
        (_ROOT / "results" / "claims.json").write_text(claims_text(claims))
    elif is_stale(_ROOT, claims):
        raise SystemExit("results/claims.json is stale; run make claims")
    failed = [claim.id for claim in claims if claim.holds is False]
    print(f"{len(claims)} claims; not met: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild results/claims.json (make claims).")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when claims.json is stale"
    )
    run_safely(functools.partial(update, parser.parse_args()))
