"""``pfm_manifest.json``: what a published adapter is, what it depends on, and its files.

The manifest identifies everything that the adapter depends on: the base model's weights and
tokenizer, the prompt, the catalogue and the previous adapter or version.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError
from pfm_llm.config.choices import Ablation, Dtype, Task
from pfm_llm.config.earlier import from_earlier
from pfm_llm.config.model import (
    AdaptersConfig,
    Count,
    HeadConfig,
    ItemsConfig,
    PositiveCount,
    WindowConfig,
)
from pfm_llm.publish.foreign import texts

FORMAT = 5
MAX_MANIFEST_BYTES = 4 << 20
_MAX_TEXT = 1000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Part):
    """The frozen model that an adapter was trained on.

    Attributes:
        name: Hub id, or the last part of a local folder's name.
        embedded: Its embedded name, when the weights came with a package registry.
        revision: The Hub revision that was asked for.
        dtype: The compute type that was asked for; ``auto`` depends on the machine.
        weights_sha256: See `backbone.hash_weights`.
        tokenizer_sha256: Over the vocabulary.
    """

    name: str
    embedded: str | None
    revision: str | None
    dtype: Dtype
    weights_sha256: str
    tokenizer_sha256: str


class Parent(_Part):
    """A predecessor of an adapter.

    Attributes:
        relation: ``previous``: the version before it in the same repository; ``trained_from``:
            the adapter that its training started from; ``restored``: the version that a rollback
            brought back.
        manifest_sha256: Of the parent's manifest.
        repo: Hub id or folder name.
        revision: The commit, where it is known.
    """

    relation: Literal["previous", "trained_from", "restored"]
    manifest_sha256: str
    repo: str
    revision: str | None = None


class Metric(_Part):
    """One figure of the evaluation, on test, over the full catalogue.

    Attributes:
        mode: Value of `types.Mode`.
        metric: Such as ``ndcg@10``.
        value: Mean over users.
        ci_low, ci_high: Bootstrap interval over users.
    """

    mode: str
    metric: str
    value: float
    ci_low: float
    ci_high: float


class Privacy(_Part):
    """The differential privacy of a user in all that the training released.

    Two data sets are neighbours if they differ in what one user gives: its updates, or nothing in
    their place. An adapter that the training started from is not covered.

    Attributes:
        epsilon, delta: What the whole run has spent.
        noise_multiplier: Standard deviation of the noise over the bound of what a user gives.
        clip_norm: The bound of a user's update.
        participation: ``passes``: every user equally often, by a public schedule, so that nothing
            is amplified; ``poisson``: by a secret draw in each round.
        cohort_size: Clients of a round; with ``poisson`` their expected number.
        num_clients: All clients; their number counts as public.
        releases: Rounds that were released, each as often as it was.
        planned_rounds: The rounds that the config asked for.
        budget: The largest ε that the run was to reach; None: there was no bound.
        accountant: The library that computed ε.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    clip_norm: float
    participation: Literal["passes", "poisson"]
    cohort_size: PositiveCount
    num_clients: PositiveCount
    releases: Count
    planned_rounds: PositiveCount
    budget: float | None
    accountant: str


class Manifest(_Part):
    """``pfm_manifest.json``.

    Attributes:
        format: `FORMAT`.
        pfm_llm: Version of this library.
        name: Of the run.
        round: The last round of the adapter's training.
        base: The frozen model.
        adapters: Rank, alpha, targets and layers of both adapters, so that a user can
            personalise it.
        modules: Paths of the adapted modules.
        head, tasks: Settings of the recommender head, and its tasks.
        window: Settings of the windows.
        items: How the text of an item becomes a vector.
        item_encoder_sha256: Identity of the encoder of items; None: the base.
        ablation: What the adapter was trained without.
        prompt: Key of the prompt.
        prompt_sha256: Hash of the prompt's content.
        data_source: Name of the data, or the last part of its path.
        catalogue_sha256: Hash of ids and texts.
        num_items: Size of the catalogue.
        contract_sha256: Hash of the federation's update contract.
        parents: The predecessors; empty for a first version.
        metrics: Figures of the evaluation; empty before the first evaluation, and under privacy,
            which does not cover them.
        privacy: The differential privacy of the training; None: there is none.
        files: Name to SHA-256 of every listed file.
    """

    format: Literal[5]
    pfm_llm: str
    name: str
    round: Count
    base: Base
    adapters: AdaptersConfig
    modules: tuple[str, ...]
    head: HeadConfig
    tasks: tuple[Task, ...] = (Task.NEXT_ITEM,)
    window: WindowConfig
    items: ItemsConfig
    item_encoder_sha256: str | None
    ablation: Ablation = Field(Ablation.NONE, exclude_if=lambda value: value is Ablation.NONE)
    prompt: str
    prompt_sha256: str
    data_source: str
    catalogue_sha256: str
    num_items: PositiveCount
    contract_sha256: str
    parents: tuple[Parent, ...] = ()
    metrics: tuple[Metric, ...] = ()
    privacy: Privacy | None = Field(None, exclude_if=lambda value: value is None)
    files: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _with_settings_of_its_time(cls, tree: Any) -> Any:
        """A manifest of an earlier version lacks settings of the head, which had no effect then."""
        head = tree.get("head") if isinstance(tree, dict) else None
        if not isinstance(head, dict):
            return tree
        return {**tree, "head": from_earlier({"head": head})["head"]}

    def to_bytes(self) -> bytes:
        """The bytes of the file, which are hashed, signed and published."""
        tree = self.model_dump(mode="json")
        return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> "Manifest":
        """Parse a manifest.

        Args:
            content: The file's bytes.
            origin: The source of the file, for messages.

        Raises:
            CorruptFileError: The content is no manifest of this format.
        """
        if len(content) > MAX_MANIFEST_BYTES:
            raise CorruptFileError(f"{origin} is larger than a manifest")
        try:
            tree = files.parse_json(content)
        except CorruptFileError as error:
            raise CorruptFileError(f"{origin} {error}") from error
        for where, text in texts(tree):
            if not text.isprintable() or len(text) > _MAX_TEXT:
                # A line end in a name could forge a line of what is printed about it.
                raise CorruptFileError(
                    f"{origin} is damaged at {where[:80]}: a text there has a line end or control "
                    f"character, or is longer than {_MAX_TEXT} characters"
                )
        found = tree.get("format") if isinstance(tree, dict) else None
        if found != FORMAT:
            raise CorruptFileError(
                f"{origin} has format {found!r}, this version of pfm_llm reads {FORMAT}: "
                "use the version of pfm_llm that wrote it, or export the run again"
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise CorruptFileError(
                f"{origin} is damaged at {where}: {error.errors()[0]['msg']}"
            ) from error
