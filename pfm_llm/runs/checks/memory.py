"""How much memory a run needs at its peak, estimated before the language model is loaded.

A run has phases, and its peak is that of the phase that needs the most. A term stands for one kind
of tensors that are in memory together. The terms follow from the code that makes these tensors; the
few constants below them were measured. ``benchmarks/memory.py`` compares estimates with measured
peaks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pfm_llm.client.trunk_cache import TRUNK_TOKENS
from pfm_llm.evaluation.baselines.selection import BaselineName, parse_names
from pfm_llm.evaluation.evaluator import OUR_MODES
from pfm_llm.evaluation.ranking import QUERIES_AT_ONCE
from pfm_llm.evaluation.scoring import queries_at_once
from pfm_llm.model.backbone import KERNELS_KEPT
from pfm_llm.model.items.vectors import ITEM_TOKENS

LOADING, TEXTS = "loading the language model", "reading the items' texts"
TRAINING, EVALUATION, BASELINES = "training", "evaluation", "baselines"
"""The phases."""

TOKENS_OF_TITLE = 10
"""About. The tokens are known only when the tokenizer is loaded."""
_MB = 10**6
_KERNEL, _KERNELS_OF_FLOAT32 = 650_000, 25 * _MB
_LIBRARIES_LATER = 60 * _MB
"""The tokenizer, PEFT, and matplotlib at the end."""
_PAIRS_APART = 10
_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True)
class Shape:
    """The numbers that the memory of a run follows from.

    Attributes:
        before: Bytes that the process holds once the data are read.
        num_weights: Numbers of the language model.
        stored: Bytes of a number in the file of the language model.
        computed: Bytes of a number in the compute dtype.
        hidden: Width of a hidden state.
        inner: Width of an MLP.
        num_top: Adapted layers that a training step runs, once more where one runs again.
        table: Bytes of the shared tensors, in float32.
        of_codes: Numbers that are summed up for each item from vectors that items share.
        num_items: Items of the catalogue.
        num_users: Users with training data.
        users_per_client: Users of one client, which are evaluated together.
        num_events: Training events.
        longest: Events of one client in a step, at most.
        usual: Events of a client in a step that nine of ten clients do not exceed.
        cohort: Clients of a round.
        chunk_tokens: Tokens of one many-clients pass.
        window_items: Items of a window.
        tokens_per_item: Positions that an item takes in a window.
        baselines: Names of the baselines.
    """

    before: int
    num_weights: int
    stored: int
    computed: int
    hidden: int
    inner: int
    num_top: int
    table: int
    of_codes: int
    num_items: int
    num_users: int
    users_per_client: int
    num_events: int
    longest: int
    usual: int
    cohort: int
    chunk_tokens: int
    window_items: int
    tokens_per_item: int
    baselines: tuple[str, ...]


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of a run.

    Attributes:
        phase: The phase that needs the most.
        parts: Its terms in bytes, largest first.
    """

    phase: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of one process."""
        return sum(self.parts.values())

    def as_json(self) -> dict[str, Any]:
        """The estimate in plain JSON types, in bytes."""
        return {"bytes": self.total, **asdict(self)}


def estimate_memory(shape: Shape) -> MemoryEstimate:
    """The peak memory of a run on a CPU, from its shape alone."""
    weights = {
        "data and libraries": shape.before,
        "weights": shape.num_weights * shape.computed,
    }
    held = weights | {
        "kernels": KERNELS_KEPT * _KERNEL if shape.computed < _FLOAT else _KERNELS_OF_FLOAT32,
        "items": _items(shape),
        "shared tensors and their moments": 6 * shape.table,
        "libraries loaded later": _LIBRARIES_LATER,
    }
    as_stored = shape.num_weights * shape.stored if shape.stored != shape.computed else 0
    phases = {
        LOADING: weights | {"weights as they are stored": as_stored},
        TEXTS: held | {"a batch of texts": _pass(shape, ITEM_TOKENS)},
        TRAINING: held | _training(shape),
        EVALUATION: held | _evaluation(shape),
        BASELINES: held | _baselines(shape),
    }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    largest = sorted(phases[phase].items(), key=lambda part: -part[1])
    return MemoryEstimate(phase, {name: size for name, size in largest if size})


def _items(shape: Shape) -> int:
    """The states of the items' texts as they are read, kept, and whitened."""
    return 3 * shape.num_items * shape.hidden * _FLOAT


def _rows(shape: Shape) -> int:
    """The rows of all items of one client, where they are sums of vectors that items share."""
    return shape.num_items * shape.of_codes * _FLOAT


def _pass(shape: Shape, num_tokens: int) -> int:
    """A pass through frozen layers, one layer at a time."""
    return num_tokens * (6 * shape.hidden + 3 * shape.inner) * shape.computed


def _training(shape: Shape) -> dict[str, int]:
    """The local steps of the largest chunk of a cohort."""
    in_chunk = min(shape.chunk_tokens // shape.tokens_per_item, shape.cohort * shape.usual)
    events = max(shape.longest, in_chunk)
    clients = min(shape.cohort, max(1, shape.chunk_tokens // shape.tokens_per_item))
    kept = 8 * shape.hidden + 4 * shape.inner
    of_token = shape.num_top * (kept * shape.computed + 3 * shape.hidden * _FLOAT)
    # Ten tables of scores with their gradients, and two of int64 for the items of the history.
    of_score = 10 * _FLOAT + 2 * _DOUBLE
    return {
        "gradients and updates of a chunk of clients": 3 * clients * shape.table,
        "rows of items with their gradients": 2 * clients * _rows(shape),
        "scores of a chunk of clients": events * shape.num_items * of_score,
        "adapted layers": events * shape.tokens_per_item * of_token,
        "a pass below the adapted layers": _pass(
            shape, min(TRUNK_TOKENS, shape.longest * shape.tokens_per_item)
        ),
    }


def _evaluation(shape: Shape) -> dict[str, int]:
    """The scores of a chunk of queries in all modes, and the tables that rank one mode."""
    tokens = shape.tokens_per_item * max(1, min(shape.window_items, shape.usual))
    at_once = queries_at_once(shape.num_items, shape.chunk_tokens)
    queries = min(at_once, max(1, shape.chunk_tokens // tokens), shape.num_users)
    queries = max(queries, shape.users_per_client)
    return {
        "rows of items": _rows(shape),
        "scores of a chunk of queries": (len(OUR_MODES) + 4) * queries * shape.num_items * _FLOAT,
        "a pass of the language model": _pass(shape, max(shape.chunk_tokens, queries * tokens)),
    }


def _baselines(shape: Shape) -> dict[str, int]:
    """The fitted baselines, and the one that needs the most while it is fitted or asked."""
    names = set(parse_names(shape.baselines))
    if not names:
        return {}
    asked = queries_at_once(shape.num_items, QUERIES_AT_ONCE) * shape.num_items
    found = {"scores of a baseline": asked * (2 * _DOUBLE + _FLOAT)}
    if names != {BaselineName.POPULARITY}:
        pairs = min(_PAIRS_APART * shape.num_events, shape.num_items**2)
        found["pairs of items"] = 5 * pairs * (_DOUBLE + _FLOAT)
    if names & {BaselineName.EASE, BaselineName.EASE_MARKOV}:
        found["EASE"] = _ease(shape.num_users, shape.num_items)
    return found


def _ease(num_users: int, num_items: int) -> int:
    """The matrices of EASE while one setting is fitted and the best one so far is kept."""
    square = _DOUBLE * min(num_users, num_items) ** 2
    if num_users >= num_items:
        return 4 * square
    weights = _DOUBLE * num_users * num_items
    return max(3 * square + weights, square + 2 * weights)
