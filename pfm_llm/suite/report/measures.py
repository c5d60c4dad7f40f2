"""The measures of a private part as a reader meets them: groups, plain names, and their meaning."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_QUALITIES = {
    "": "log-rank",
    "log_rank": "log-rank",
    "ndcg": "NDCG",
    "auc": "like AUC",
    "log_likelihood": "log-likelihood of the likes",
}
_QUALITY = f"(?P<quality>{'|'.join(filter(None, _QUALITIES))})"
_OTHER = "Other measures"


@dataclass(frozen=True)
class Measure:
    """A kind of measure.

    Attributes:
        group: The heading of its table.
        pattern: What the whole name of a figure matches.
        name: The plain name, with the parts of the pattern.
        meaning: One sentence on it.
        is_difference: Whether 0 means "no difference".
    """

    group: str
    pattern: str
    name: str
    meaning: str
    is_difference: bool = True


@dataclass(frozen=True)
class Shown:
    """A figure as it is shown.

    Attributes:
        measure: Its kind.
        name: Its plain name.
    """

    measure: Measure
    name: str


_GAIN, _OVER = "Gain from the private part", "Compared with baselines"
_OWN, _STABLE = "Is a private part personal?", "Do lists stay?"
_GROUPS, _MEMORY = "Groups of users", "Fewer items in the prompt"
_ADDS = "What the language model adds"
_BESIDE = "Beside another run"
_COLD, _NEW = "Few interactions known", "Items that nobody met in training"

_MEASURES = (
    Measure(
        _ADDS, f"adds_{_QUALITY}", "Lost in {quality} without it, with the private part",
        "How much better the whole method serves the same users than this run, which is trained "
        "without one part of it; the run's name says which.",
    ),
    Measure(
        _ADDS, f"adds_{_QUALITY}_shared", "Lost in {quality} without it, shared part alone",
        "The same for users without a private part.",
    ),
    Measure(
        _BESIDE, f"beside_{_QUALITY}", "Difference in {quality}, with the private part",
        "How much better this run serves the same users than the run that it could replace; the "
        "suite's `beside` says which.",
    ),
    Measure(
        _BESIDE, f"beside_{_QUALITY}_shared", "Difference in {quality}, shared part alone",
        "The same for users without a private part.",
    ),
    Measure(
        _GAIN, f"gain_{_QUALITY}", "Gain in {quality}",
        "How much better the user's own private part ranks than the shared part alone; a gain of "
        "0.1 in log-rank means that an item stands at nine tenths of its former rank.",
    ),
    Measure(
        _GAIN, f"gain_{_QUALITY}_over_private", "Gain in {quality} over the private part alone",
        "How much better both parts rank together than the private part without the shared LoRA.",
    ),
    Measure(
        _GAIN, "not_harmed", "Share of users not harmed",
        "The share of users who are ranked at least as well with the private part; above one half "
        "is good.", is_difference=False,
    ),
    Measure(
        _OVER, "ndcg_over_(?P<other>.+)_shared", "NDCG less that of {other}, shared part alone",
        "The quality without private parts less that of a baseline, for the same users.",
    ),
    Measure(
        _OVER, "ndcg_over_(?P<other>.+)", "NDCG less that of {other}",
        "The quality of the run less that of a baseline, for the same users.",
    ),
    Measure(
        _OWN, f"swap_{_QUALITY}", "Cost of a stranger's part, in {quality}",
        "How much a user loses if served with the private part of another user.",
    ),
    Measure(
        _OWN, "identification(?:_(?P<by>.+))?", "Users told by their own part{by}",
        "The share of users whom their own private part serves best, among those of strangers.",
        is_difference=False,
    ),
    Measure(
        _OWN, f"own_over_mean_{_QUALITY}", "Own part less the mean of all, in {quality}",
        "How much better a user's own private part serves than the mean of all users' parts.",
    ),
    Measure(
        _OWN, f"mean_over_shared_{_QUALITY}", "Mean of all parts less none, in {quality}",
        "How much the mean of all users' private parts adds, which has nothing of a user's own.",
    ),
    Measure(
        _OWN, f"(?P<piece>lora|embedding)_alone_{_QUALITY}", "{piece} alone, gain in {quality}",
        "How much one piece of the private part adds to the shared part without the other.",
    ),
    Measure(
        _MEMORY, f"(?P<piece>lora|embedding)_alone_{_QUALITY}_(?P<count>[0-9]+)",
        "{count} items: {piece} alone, gain in {quality}",
        "How much one piece of the private part adds when the prompt shows so many items.",
    ),
    Measure(
        _MEMORY, "memory_(?P<count>[0-9]+)_over_(?P<longer>[0-9]+)",
        "{count} items with the private part less {longer} without: log-rank",
        "Whether the private part is worth more than the items that the prompt does not show.",
    ),
    Measure(
        _OWN, f"steps_over_read_{_QUALITY}", "Private steps less none, in {quality}",
        "How much gradient steps at home add to the LoRA that is read off the history.",
    ),
    Measure(
        _STABLE, "integrity_rbo", "Overlap after a new shared part",
        "How much of a user's list stays when a new shared part arrives; 1 is all of it.",
        is_difference=False,
    ),
    Measure(
        _STABLE, "integrity_rbo_retuned", "Overlap after a new shared part and a new fit",
        "How much of a user's list stays when the private part is then fitted again.",
        is_difference=False,
    ),
    Measure(
        _GROUPS, "harm_(?P<users>.+)", "{users}",
        "The mean gain in log-rank of a group of users; below 0 the group is worse off with the "
        "private part, and decile 1 is the lowest tenth.",
    ),
    *(
        measure
        for group, key, items, when in (
            (_MEMORY, "memory", "items", "when the prompt shows so many items"),
            (_COLD, "cold_start", "known", "when so many interactions of a user are known"),
        )
        for start in (f"{key}(?:_{_QUALITY})?_(?P<count>[0-9]+)",)
        for measure in (
            Measure(
                group, start, f"{{count}} {items}: gain in {{quality}}",
                f"How much the private part adds {when}.",
            ),
            Measure(
                group, f"{start}_shared", f"{{count}} {items}: {{quality}}, shared part alone",
                f"The quality without private parts {when}; nearer to 0 is better in log-rank.",
                is_difference=False,
            ),
            Measure(
                group, f"{start}_own", f"{{count}} {items}: {{quality}}, with the private part",
                f"The quality with private parts {when}; nearer to 0 is better in log-rank.",
                is_difference=False,
            ),
        )
    ),
    Measure(
        _COLD, "cold_start_(?P<count>[0-9]+)_over_none", "{count} known: log-rank over none",
        "How much better a user is served who is known by so few interactions, than if none were "
        "known.",
    ),
    Measure(
        _COLD, "cold_start_(?P<count>[0-9]+)_over_none_shared",
        "{count} known: log-rank over none, shared part alone", "The same without private parts.",
    ),
    Measure(
        _NEW, "new_items", "Gain in log-rank",
        "How much the private part adds on items that are in no training history.",
    ),
    Measure(
        _NEW, "new_items_over_chance", "Log-rank above a random order",
        "How much better than at random such items are ranked.",
    ),
    Measure(
        _NEW, "new_items_shared", "Log-rank, shared part alone",
        "The log-rank of such items without private parts; nearer to 0 is better.",
        is_difference=False,
    ),
    Measure(
        _NEW, "new_items_own", "Log-rank, with the private part",
        "The log-rank of such items with private parts; nearer to 0 is better.",
        is_difference=False,
    ),
    *(
        Measure(_NEW, f"{name}{kind}", f"{place}, {way}", f"{meaning} .5 is a random order.",
            is_difference=False)
        for name, place, meaning in (
            ("new_items_percentile", "Place among all items",
             "How far up such items stand among all that the user has not met."),
            ("new_items_among_new", "Place among the new items",
             "How far up they stand among each other: what the texts alone tell."),
        )
        for kind, way in (("", "with the private part"), ("_shared", "shared part alone"),
            ("_cosine", "by the cosine of texts, without any training"))
    ),
    Measure(
        _NEW, "new_items_over_stranger", "What is lost with another user's history",
        "How much lower such items stand among each other for the history of somebody else.",
    ),
    Measure(
        _NEW, "new_items_in_top_ten", "Share of the top ten",
        "How many of ten recommended items are in no training history.",
        is_difference=False,
    ),
    Measure(
        _NEW, "new_items_in_top_ten_shown", "Share of the top ten that is shown",
        "The same for the list that a user sees: new items have at least the places that their "
        "share of the candidates gives them, rounded down.",
        is_difference=False,
    ),
    Measure(
        _NEW, "new_items_shown_ndcg", "What that rule changes in NDCG@10",
        "The NDCG@10 of the list that a user sees, less that of the plain ranking, over all that "
        "is asked for.",
    ),
    Measure(
        _NEW, "new_items_in_targets", "Share of what is asked for",
        "How many of the held-out items are in no training history.",
        is_difference=False,
    ),
)  # fmt: skip


def shown(metric: str) -> Shown:
    """A figure as it is shown; one of an unknown kind stands under its own name.

    Args:
        metric: The metric of a row.
    """
    for measure in _MEASURES:
        if found := re.fullmatch(measure.pattern, metric):
            return Shown(measure, _named(measure.name, found))
    return Shown(Measure(_OTHER, "", "", "", is_difference=False), metric)


def by_group(metrics: Iterable[str]) -> dict[str, list[str]]:
    """Heading to metrics, both in the order of the measures; unknown kinds come last."""
    order = {measure: place for place, measure in enumerate(_MEASURES)}
    headings = {measure.group: None for measure in _MEASURES} | {_OTHER: None}
    found: dict[str, list[str]] = {heading: [] for heading in headings}
    for metric in metrics:
        found[shown(metric).measure.group].append(metric)
    for heading in (_GAIN, _OWN, _STABLE, _NEW):
        found[heading].sort(key=lambda metric: order[shown(metric).measure])
    return {heading: own for heading, own in found.items() if own}


def _named(name: str, found: re.Match[str]) -> str:
    parts = {key: (value or "").replace("_", " ") for key, value in found.groupdict().items()}
    if "quality" in parts:
        parts["quality"] = _QUALITIES[found["quality"] or ""]
    if parts.get("by"):
        parts["by"] = f" ({parts['by']})"
    return name.format(**parts)
