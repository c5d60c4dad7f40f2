"""The Gaussian mechanism on the sum of a round, and what all rounds of a run have cost.

With C the bound of a user's update, n the size of a cohort and z the noise multiplier, a round
releases

    (Σ_u Δ_u + N(0, z² S² I)) / n,    ‖Δ_u‖₂ <= C

(McMahan et al. 2018, arXiv 1710.06963, algorithm 1). n is what the config says, not how many
answered: the number is a figure of users too. S is C and the rounding of sums (`sensitivity`).

**What is counted.** Two data sets are neighbours if they differ in what one user gives: its
updates, or nothing in their place. The clients, their number and the schedule of *passes* are
public. With passes, every user is in at most ⌈R n / N⌉ of R rounds among N users, and anybody can
compute in which. So that many Gaussian mechanisms are composed, and sampling amplifies nothing.
With *poisson* each user is in a round with the chance n / N, drawn from a secret key and
independently of all else. Then all rounds are composed, each amplified by sampling. A round that
is released again, after a crash, is counted again, for those who are in it.
"""

import bisect
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pfm_llm.base.errors import CheckpointError, ConfigError, ContractError, TrainingError
from pfm_llm.config.choices import Participation
from pfm_llm.config.schema import FederationConfig
from pfm_llm.config.settle import known
from pfm_llm.config.stages import PrivacyConfig
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.stages.clip import Clip
from pfm_llm.protocol.stages.stage import StageContext
from pfm_llm.protocol.types import Refusal, Tensors
from pfm_llm.server.aggregation import Aggregator, WeightedMean
from pfm_llm.server.participation import select_cohort
from pfm_llm.server.privacy.accounting import (
    accountant_name,
    epsilon_of,
    most_within,
    noise_multiplier_for,
)
from pfm_llm.server.privacy.ledger import Ledger
from pfm_llm.server.privacy.noise import SecretStream

_ROUNDING = 2.0**-18
"""Share of C, for each client of a cohort, by which rounding may move a sum beyond C: a node sends
its sum in float32 (2^-23), and `Clip` may shorten the sum of a node (10^-6)."""


@dataclass(frozen=True)
class Spent:
    """What a run has spent; all of it may be published.

    Attributes:
        epsilon: ε so far.
        delta: δ.
        noise_multiplier: Standard deviation of the noise over the bound of what a user gives.
        clip_norm: The bound C of a user's update.
        participation: Who takes part in a round.
        cohort_size: Clients of a round; with ``poisson`` their expected number.
        num_clients: All clients, a public number.
        releases: Rounds that were released, each as often as it was.
        planned_rounds: The rounds that the config asks for.
        budget: The largest ε that the run may reach; None: there is no bound.
        accountant: The library that computed ε.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    clip_norm: float
    participation: str
    cohort_size: int
    num_clients: int
    releases: int
    planned_rounds: int
    budget: float | None
    accountant: str


@dataclass
class _Session:
    """What a process needs to release: the ledger, the key of its noise, and the round paid for."""

    ledger: Ledger
    key: bytes
    charged_round: int = 0


class PrivateMean:
    """Releases the means of rounds under noise.

    Args:
        config: The federation; it has a group ``privacy``.
        client_ids: All clients.
        seed: The experiment's seed, from which *passes* follow.
        rounding: How far rounding of a single update may move it beyond C, in the same unit.

    Attributes:
        committed: Releases that the loaded checkpoint knows of.
    """

    def __init__(
        self, config: FederationConfig, client_ids: Sequence[str], seed: int, rounding: float = 0.0
    ) -> None:
        clip = config.stages[-1].clip
        if config.privacy is None or clip is None:
            raise ConfigError("federation.privacy needs a clip as the last of federation.stages")
        self._settings: PrivacyConfig = config.privacy
        self._client_ids, self._seed = sorted(client_ids), seed
        self._cohort_size, self._planned = known(config.cohort_size), known(config.num_rounds)
        self._clip = Clip(clip.norm)
        self._rounding = rounding
        self._session: _Session | None = None
        self.committed = 0
        if not 1 <= self._cohort_size <= len(client_ids):
            raise ConfigError(
                f"federation.cohort_size is {self._cohort_size} but there are {len(client_ids)} "
                f"clients; set it between 1 and {len(client_ids)}"
            )
        if self._settings.delta * len(client_ids) >= 1:
            raise ConfigError(
                f"federation.privacy.delta is {self._settings.delta:g} with {len(client_ids)} "
                "users, and gives one of them away; set it far below 1 over their number"
            )

    @property
    def sensitivity(self) -> float:
        """S: how far what one user gives may move a sum, in the units of an update."""
        return self._clip.norm * (1 + _ROUNDING * self._cohort_size) + self._rounding

    @property
    def rate(self) -> float | None:
        """The chance with which a user is in a round; None with ``passes``."""
        is_poisson = self._settings.participation is Participation.POISSON
        return self._cohort_size / len(self._client_ids) if is_poisson else None

    @property
    def schedule(self) -> str:
        """SHA-256, in hex, over all that decides who takes part in a round, but the secret."""
        participation = self._settings.participation.value
        decides = [self._client_ids, self._cohort_size, self._seed, participation]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def new_ledger(self, secret: bytes) -> Ledger:
        """The ledger of a run that has released nothing, without a file.

        Args:
            secret: The key by which cohorts are drawn.

        Raises:
            ConfigError: No noise is enough, or the library that computes it is not installed.
        """
        settings = self._settings
        noise = settings.noise_multiplier
        if noise is None:
            count, epsilon = self._count([1] * self._planned), settings.epsilon or 0.0
            noise = noise_multiplier_for(epsilon, count, self.rate, settings.delta)
        return Ledger(None, noise, secret, self.schedule)

    def start(self, ledger: Ledger, key: bytes) -> None:
        """Go on with a ledger.

        Args:
            ledger: That of the run.
            key: Fresh secret bytes for the noise, equal on every process of the server.

        Raises:
            CheckpointError: The ledger knows of fewer releases than the checkpoint, or is of
                other clients or cohorts.
        """
        if ledger.schedule != self.schedule:
            raise CheckpointError(
                "the ledger of privacy is of other clients or cohorts, so what it says does not "
                "fit; start a new run"
            )
        if ledger.total < self.committed:
            raise CheckpointError(
                f"the ledger of privacy knows of {ledger.total} releases and the checkpoint of "
                f"{self.committed}; restore privacy.json of the same run, or start a new run"
            )
        self._session = _Session(ledger, key)

    def admitted(self, first_round: int) -> int:
        """The last round that the budget admits, at most the last of the run.

        Args:
            first_round: The next round.
        """
        budget, releases = self._settings.budget, self._started.ledger.releases
        if budget is None:
            return self._planned
        noise, delta = self._started.ledger.noise_multiplier, self._settings.delta

        def count_until(round_number: int) -> int:
            later = [0] * (first_round - 1) + [1] * (round_number - first_round + 1)
            width = max(len(later), len(releases))
            padded = [own + [0] * (width - len(own)) for own in (later, releases)]
            return self._count([sum(pair) for pair in zip(*padded, strict=True)])

        if epsilon_of(noise, count_until(self._planned), self.rate, delta) <= budget:
            return self._planned
        most = most_within(budget, noise, self.rate, delta)
        rounds = range(first_round, self._planned + 1)
        return first_round - 1 + bisect.bisect_right(rounds, most, key=count_until)

    def charge(self, round_number: int) -> None:
        """Pay for the release of a round, before `release`.

        Raises:
            DiskSpaceError, StorageError: The ledger could not be written.
        """
        self._started.ledger.charge(round_number)
        self._started.charged_round = round_number

    def bounded(self, sender: str, delta: Tensors) -> Tensors:
        """An update of norm at most C, after all stages; one that is within C is unchanged.

        Raises:
            ContractError: The update is not finite.
        """
        if not all(bool(torch.isfinite(tensor).all()) for tensor in delta.values()):
            raise ContractError(
                f"client {sender!r:.80}: a stage made its update not finite", Refusal.NOT_FINITE
            )
        return self._clip.on_client(delta, StageContext(0, 0, self._cohort_size, sender))

    def release(
        self, updates: Aggregator, specs: Mapping[str, TensorSpec], round_number: int
    ) -> dict[str, torch.Tensor]:
        """The mean of a round under noise: name to float32 CPU tensor.

        A round without any update releases noise alone: that nobody answered is not told. Sum and
        noise are float64; only what is released is rounded to float32.

        Args:
            updates: Those that `bounded` has seen, each with the weight 1.
            specs: The tensors of the contract.
            round_number: The round.

        Raises:
            TrainingError: The release was not paid for; each may be made once.
        """
        session = self._started
        if session.charged_round != round_number:
            raise TrainingError(f"round {round_number} is to be charged before it is released")
        session.charged_round = 0
        assert isinstance(updates, WeightedMean)  # the config admits no other
        deviation = session.ledger.noise_multiplier * self.sensitivity
        # The number of releases never comes twice, even where a round does.
        stream = SecretStream(session.key, session.ledger.total)
        summed, released = updates.summed(), {}
        for name, spec in specs.items():
            noisy = stream.normal(spec.shape).mul_(deviation)
            if name in summed:
                noisy += summed[name]
            released[name] = noisy.div_(self._cohort_size).to(torch.float32)
        return released

    def drawn_cohort(self, round_number: int) -> tuple[str, ...] | None:
        """The clients of a round with ``poisson``, in order; None with ``passes``.

        The draw follows from the ledger's secret, not from the seed: amplification needs that
        nobody knows who took part. A round that is released again is drawn again.
        """
        rate = self.rate
        if rate is None:
            return None
        releases = self._started.ledger.releases
        before = releases[round_number - 1] if round_number <= len(releases) else 0
        stream = SecretStream(self._started.ledger.secret, (round_number << 32) + before)
        drawn = stream.uniform(len(self._client_ids)) < rate
        return tuple(c for c, is_in in zip(self._client_ids, drawn, strict=True) if is_in)

    def spent(self, ledger: Ledger | None = None) -> Spent:
        """What the run has spent.

        Args:
            ledger: That of the run; None: the one that was started with.
        """
        ledger = ledger or self._started.ledger
        settings = self._settings
        count = self._count(ledger.releases)
        return Spent(
            epsilon=epsilon_of(ledger.noise_multiplier, count, self.rate, settings.delta),
            delta=settings.delta,
            noise_multiplier=ledger.noise_multiplier,
            clip_norm=self._clip.norm,
            participation=settings.participation.value,
            cohort_size=self._cohort_size,
            num_clients=len(self._client_ids),
            releases=ledger.total,
            planned_rounds=self._planned,
            budget=settings.budget,
            accountant=accountant_name(),
        )

    @property
    def num_releases(self) -> int:
        """Releases so far; before `start` those that the checkpoint knows of."""
        return self.committed if self._session is None else self._session.ledger.total

    def _count(self, releases: Sequence[int]) -> int:
        """Releases that are composed, for the user who is in most of them.

        Args:
            releases: How often each round was released, from round 1.
        """
        if self.rate is not None:
            return sum(releases)
        again: Counter[str] = Counter()
        for round_number, number in enumerate(releases, start=1):
            if number > 1:
                cohort = select_cohort(
                    self._client_ids, self._cohort_size, self._seed, round_number
                )
                again.update(dict.fromkeys(cohort, number - 1))
        passes = -(-len(releases) * self._cohort_size // len(self._client_ids))
        return passes + max(again.values(), default=0)

    @property
    def _started(self) -> _Session:
        if self._session is None:
            raise ConfigError("federation.privacy needs a ledger; start it with PrivateMean.start")
        return self._session


def as_figures(spent: Spent) -> dict[str, float]:
    """What the record of a committed round holds of `Spent`."""
    kept = ("epsilon", "delta", "releases")
    return {name: value for name, value in dataclasses.asdict(spent).items() if name in kept}
