"""How often the test split of some data has been measured for each method.

A test split that is measured many times while settings change is no longer a test. So each
measurement is counted before it begins, in a file beside the results, and the result says the
count. A run that is resumed and measured again counts again, and so does one that is stopped
half-way. A result that is only read counts nothing. Not counted are measurements outside runs,
suites, trained baselines and the benchmarks that rank held-out items of test.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError
from pfm_llm.base.locks import locked
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import HeldOut, Split

OPENINGS = "test_openings"
"""The key of a result file: the split and, for each method, `count_opening`'s figures."""

OPENINGS_FILE = f"{OPENINGS}.json"
_LOCK = f"{OPENINGS}.lock"


def count_opening(
    file: Path, interactions: Interactions, split: Split, methods: Mapping[str, str]
) -> dict[str, Any]:
    """Count one more measurement of a test split for some methods.

    Args:
        file: The file of the counts; it is made if it is missing. Processes take turns, and a
            process that is killed leaves the old file or the new one.
        interactions: The data.
        split: Their split.
        methods: Name of each method to its settings, as text or as a hash of them.

    Returns:
        ``split``, the `fingerprint` of the test split, and ``methods``: for each its ``times``,
        and its ``times_with_these_settings``, both with this one.

    Raises:
        CorruptFileError: The file does not have the format that this function writes.
        StorageError: The file cannot be read or written.
    """
    key = fingerprint(interactions, split.test)
    with files.storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process counts in {file}; waiting for it"
    with locked(file.with_name(_LOCK), busy, wait=True):
        tree = _read(file)
        about = {"rule": split.rule, "users": len(split.test.users), "methods": {}}
        counts = tree.setdefault(key, about)["methods"]
        for method, settings in methods.items():
            own = counts.setdefault(method, {})
            own[settings] = own.get(settings, 0) + 1
        files.write_json(file, tree)
    return _figures(key, tree, methods)


def counts_of(
    file: Path, interactions: Interactions, split: Split, methods: Mapping[str, str]
) -> dict[str, Any]:
    """As `count_opening`, without counting: the measurements so far, 0 where there was none."""
    return _figures(fingerprint(interactions, split.test), _read(file), methods)


def fingerprint(interactions: Interactions, held_out: HeldOut) -> str:
    """An identity of one split of some data: 16 hex digits of a SHA-256.

    It depends on the events, and on the users, histories and targets of the queries.
    """
    digest = hashlib.sha256(f"{interactions.events_hash()}:{held_out.name}".encode())
    for arrays in ([held_out.users], held_out.histories, held_out.targets):
        lengths = np.array([len(array) for array in arrays], "<i8")
        digest.update(lengths.tobytes())
        digest.update(np.concatenate(arrays).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short identity of settings in plain JSON types; their order does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def describe_openings(openings: Mapping[str, Any], methods: Iterable[str]) -> str:
    """The counts of some methods in words; empty where a result file has none.

    Args:
        openings: The entry `OPENINGS` of a result file; empty for a file from before there was one.
        methods: The methods to name.
    """
    counts = openings.get("methods", {})
    return ", ".join(f"{name} {counts[name]['times']}" for name in methods if name in counts)


def _figures(key: str, tree: Mapping[str, Any], methods: Mapping[str, str]) -> dict[str, Any]:
    counts = tree.get(key, {"methods": {}})["methods"]
    found = {}
    for method, settings in methods.items():
        own = counts.get(method, {})
        with_these = own.get(settings, 0)
        found[method] = {"times": sum(own.values()), "times_with_these_settings": with_these}
    return {"split": key, "methods": found}


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = files.read_json(file)
    except FileNotFoundError:
        return {}
    except CorruptFileError as error:
        raise _corrupt(file) from error
    if not isinstance(tree, dict) or not all(map(_is_entry, tree.values())):
        raise _corrupt(file)
    return tree


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("methods"), dict):
        return False
    counts = entry["methods"].values()
    return all(
        isinstance(own, dict) and all(type(times) is int for times in own.values())
        for own in counts
    )


def _corrupt(file: Path) -> CorruptFileError:
    return CorruptFileError(
        f"{file} does not hold counts of test measurements; restore it from version control, or "
        "delete it to count from 0"
    )
