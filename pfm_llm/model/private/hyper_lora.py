"""A private LoRA that is read off the history, in factors that everybody learns.

A private LoRA that takes gradient steps must learn thousands of numbers from one user's hundred
events. Here all clients learn the factors A and B of each adapted module, and a user's own LoRA is
their product with a few coefficients between them::

    h_u = W x + s B diag(c_u) A x,    c_u = H phi_u     A [r, in], B [out, r], H [r, q]

with s = alpha / r. H is shared as well, one for each module. phi_u [q] is the user embedding of
`taste`. The layer that turns a user vector u [D] into scores of the items has such a LoRA too::

    scores_u = W u + V diag(phi_u) A u + V phi_u     A [q, D], V [I, q]

V are the item features of the user embedding, whose own term is the bias of this LoRA: the
embedding says what a user likes, and the LoRA how this changes with what they have met last.

Where items have no IDs, phi_u is a fading mean of T z_i, where z_i are the whitened texts of the
items, with T, half-lives and priors of its own; V is then another map of the texts. The private
part thus follows from the history and the shared state: a new shared state makes nothing stale,
and an empty history gives no LoRA. No step need be taken at home; with ``adapters.private.steps``
the client refines its coefficients (`pfm_llm.client.private_steps`). A network that computes the
weights of another is a hypernetwork (Ha, Dai and Le 2017, ICLR, arXiv 1609.09106); HyperLoRA (Lv et
al. 2024, Findings of EMNLP) computes those of a LoRA.

The adapted modules are the output of the attention and the MLP of the last layer, which map each
token by itself. A state therefore depends on the coefficients at its own token alone. In training
each position has the coefficients of its own past, and the states of all positions still follow
from one more run of the last layer. In serving every token has the coefficients of the whole
history, and the LoRA is an ordinary one of rank r, with the factors A and s B diag(c_u).

The loss is that of `objective`: the shared scores are fixed in it, so A, B and H learn what the
shared LoRA leaves over.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch

from pfm_llm.base import seeding
from pfm_llm.base.errors import BackboneError
from pfm_llm.config.choices import Task
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model import head as recommender_head
from pfm_llm.model.ablation import has_pass
from pfm_llm.model.outputs import SharedView
from pfm_llm.model.private.last_layer import BEHIND_ATTENTION
from pfm_llm.model.private.lora import random_a
from pfm_llm.model.private.part import Factors, OutputLora, PastLora
from pfm_llm.model.private.taste import (
    READ_OUT,
    UserEmbedding,
    fading_means,
    pace_parameters,
    read_vectors,
)
from pfm_llm.protocol.parameters import Parameter, Sizes
from pfm_llm.protocol.types import Tensors

_RATE = 3e-3
_LAYER = re.compile(r"\.([0-9]{1,4})\.")
LORA = "basis.hyper_lora"
"""Prefix of the shared tensors: ``<module>.A``, ``<module>.B`` and ``<module>.coefficients``."""
OUTPUT = f"{LORA}.output"
"""Name of the A of the layer that gives scores, [q, D]."""
OUTPUT_TEXT = f"{LORA}.output_text"
"""Name of the map [q, D] from texts to V, where items have no IDs."""
OUTPUT_OWN = "private.hyper_lora.output"
"""Name of the client's coefficients of that layer, [q]: its phi."""
TEXT = f"{LORA}.text"
"""Name of T, [q, D], where items have no IDs."""
_HALF_LIFE, _EVENTS = f"{LORA}.log_half_life", f"{LORA}.log_events"


class HyperLora(UserEmbedding):
    """The kind ``hyper_lora``: LoRA in the last layer and on the scores, and a user embedding."""

    acts_on_states: ClassVar[bool] = True
    pieces: ClassVar[Mapping[str, str]] = {
        "lora": "private.hyper_lora.",
        "embedding": "private.taste.",
    }

    def __init__(self, config: ExperimentConfig, sizes: Sizes) -> None:
        """See `PrivatePart`.

        Raises:
            BackboneError: The last layer has no adapted module that maps each token by itself.
        """
        super().__init__(config, sizes)
        self._modules = by_token(sizes.modules)

    @property
    def lora_modules(self) -> Mapping[str, str]:
        """The output of the attention and the MLP of the last layer; none without a pass."""
        modules = self._modules if has_pass(self.config) else ()
        return {module: _own(module) for module in modules}

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Those of the modules, and of the layer that gives scores."""
        return *self.lora_modules.values(), OUTPUT_OWN

    def shared_parameters(self) -> list[Parameter]:
        """Factors and H of each adapted module, and what the user embedding needs."""
        rank, seed = self.settings.rank, self.config.seed
        width = self.dropout_width({})
        found = super().shared_parameters()
        found.append(Parameter(OUTPUT, (width, self.config.head.dim), _RATE))
        if not self._is_read:
            found += _text_parameters(width, self.config)
        for module, (fan_in, fan_out) in self._modules.items():
            key = f"{LORA}.{module}"
            draw_a = partial(random_a, rank, fan_in, seed, key)
            draw_h = partial(_normal, (rank, width), seed, f"{key}.coefficients")
            found += [
                Parameter(f"{key}.A", (rank, fan_in), _RATE, draw_a),
                Parameter(f"{key}.B", (fan_out, rank), _RATE),
                Parameter(f"{key}.coefficients", (rank, width), _RATE, draw_h),
            ]
        return found

    def initial(self, client_id: str) -> dict[str, torch.Tensor]:
        """Coefficients and vectors of zero, the same for every client."""
        own = {_own(module): torch.zeros(self.settings.rank) for module in self._modules}
        own[OUTPUT_OWN] = torch.zeros(self.dropout_width({}))
        return super().initial(client_id) | own

    def lora(self, stacked: Tensors) -> dict[str, Factors]:
        """See `PrivatePart.lora`."""
        return {module: self._term(module, stacked) for module in self._modules}

    def past_lora(self, view: SharedView) -> PastLora:
        """H times the user embedding of each position's past, with its dropout, and the steps."""
        read, steps = self._read(view)[view.outputs.known], view.outputs.steps
        past = self._coefficients(view.own, _dropped(read, view))
        return PastLora({m: one + steps.get(_own(m), 0) for m, one in past.items()}, read)

    def dropout_width(self, own: Tensors) -> int:
        """q, the width of phi_u."""
        return self.settings.taste.read_rank or self.settings.taste.rank

    def factors(self, module: str, stacked: Tensors, weight: float) -> Factors | None:
        """The user's own LoRA: A, and B times the coefficients."""
        own = stacked.get(_own(module))
        if own is None or f"{LORA}.{module}.A" not in stacked:
            return None
        a, b = self._term(module, stacked)
        return a, b * own.unsqueeze(-2) * weight

    def past_scores(self, view: SharedView) -> torch.Tensor:
        """The scores of the user embedding and of both LoRAs, [K, I]."""
        scores, outputs = super().past_scores(view), view.outputs
        vectors = outputs.vectors.detach()
        if outputs.moved is not None:
            fixed = {name: value.detach() for name, value in view.own.items()}
            scores = scores + recommender_head.inner_products(fixed, outputs.moved, view.texts)
            vectors = vectors + outputs.moved
        read = self._read(view)[outputs.known] if outputs.read is None else outputs.read
        coefficients = _dropped(read, view) + outputs.steps.get(OUTPUT_OWN, 0)
        return scores + _output_scores(view.own, coefficients, vectors, view.texts)

    def added_scores(
        self,
        own: Tensors,
        task: Task,
        texts: torch.Tensor,
        weight: float,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The scores of the user embedding, and of the LoRA of the layer that gives scores."""
        scores = super().added_scores(own, task, texts, weight)
        coefficients = own.get(OUTPUT_OWN)
        if vectors is None or coefficients is None:
            return scores
        added = _output_scores(own, coefficients * weight, vectors, texts)
        return added if scores is None else scores + added

    def output_lora(self, own: Tensors, texts: torch.Tensor, weight: float) -> OutputLora | None:
        """See `PrivatePart.output_lora`; the bias is the user embedding's term."""
        coefficients = own.get(OUTPUT_OWN)
        if coefficients is None:
            return None
        bias = super().added_scores(own, Task.NEXT_ITEM, texts, weight)
        features = _features(own, texts)
        return own[OUTPUT], features * (coefficients * weight), bias

    def fit(self, view: SharedView) -> dict[str, torch.Tensor]:
        """The user embedding of the whole history, and the coefficients that follow from it."""
        read = self._read(view)[-1]
        own = self._coefficients(view.own, read) | {"output": read}
        return super().fit(view) | {_own(module): value for module, value in own.items()}

    def _read(self, view: SharedView) -> torch.Tensor:
        """Phi of every past, float32 [K + 1, q]; see `taste.fading_means`."""
        own, met = view.own, view.outputs.met
        if self._is_read:
            return read_vectors(own, met)
        return fading_means(
            view.texts[met] @ own[TEXT].T, own[_HALF_LIFE].exp(), own[_EVENTS].exp()
        )

    def _term(self, module: str, stacked: Tensors) -> Factors:
        """A, and B times its scale, of one module."""
        key = f"{LORA}.{module}"
        return stacked[f"{key}.A"], stacked[f"{key}.B"] * self.settings.scale

    def _coefficients(self, own: Tensors, read: torch.Tensor) -> dict[str, torch.Tensor]:
        """By module its coefficients [..., r] for user embeddings [..., q]."""
        return {m: read @ own[f"{LORA}.{m}.coefficients"].T for m in self._modules}


def by_token(modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The modules of the last adapted layer whose output no other token reads.

    Args:
        modules: Path in the model to (in, out) of each adapted layer.

    Raises:
        BackboneError: There is none.
    """
    layers = {name: int(match[1]) for name in modules if (match := _LAYER.search(name))}
    last = max(layers.values(), default=-1)
    found = {
        name: modules[name]
        for name, layer in layers.items()
        if layer == last and (".mlp." in name or name.rpartition(".")[2] in BEHIND_ATTENTION)
    }
    if not found:
        raise BackboneError(
            "adapters.private.kind: hyper_lora adapts the MLP and the output of the attention, and "
            f"finds none of them among {', '.join(modules) or 'no modules'}; set adapters.targets: "
            "all-linear, or method: pfm_embedding"
        )
    return found


def _text_parameters(width: int, config: ExperimentConfig) -> list[Parameter]:
    shape = (width, config.head.dim)
    texts = [
        Parameter(name, shape, _RATE, partial(_normal, shape, config.seed, name))
        for name in (TEXT, OUTPUT_TEXT)
    ]
    return [*texts, *pace_parameters(_EVENTS, _HALF_LIFE)]


def _dropped(read: torch.Tensor, view: SharedView) -> torch.Tensor:
    """Phi [K, q] with the dropout of this step."""
    kept = view.outputs.kept_private
    return read if kept is None else read * kept


def _output_scores(
    own: Tensors, coefficients: torch.Tensor, vectors: torch.Tensor, texts: torch.Tensor
) -> torch.Tensor:
    """Scores [K, I] of V diag(c) A for coefficients [K, q] or [q] and user vectors [K, D]."""
    return (coefficients * (vectors @ own[OUTPUT].T)) @ _features(own, texts).T


def _features(own: Tensors, texts: torch.Tensor) -> torch.Tensor:
    """V, float32 [I, q]."""
    return own[READ_OUT] if READ_OUT in own else texts @ own[OUTPUT_TEXT].T


def _normal(shape: tuple[int, int], seed: int, purpose: str) -> torch.Tensor:
    generator = seeding.generator(seed, purpose)
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5


def _own(module: str) -> str:
    return f"private.hyper_lora.{module}"
