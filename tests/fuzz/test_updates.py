"""Updates that are wrong in any way: the server refuses them, and is as if they had not come."""

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.config.choices import Aggregation, ServerOptimizer, Weighting
from pfm_llm.config.schema import FederationConfig, ServerConfig
from pfm_llm.config.stages import ClipConfig, StageConfig
from pfm_llm.protocol.types import ClientUpdate
from pfm_llm.server.server import Server
from tests.fuzz import NUM_INPUTS, hostile, report
from tests.support.tables import table_of

CLIENTS = tuple("abcdefgh")
ROUNDS_BEFORE = (0, 1, 3)
TABLE = table_of(
    {
        "lora.m.A": torch.zeros(2, 3),
        "lora.m.B": torch.zeros(3, 2),
        "head.item_bias": torch.zeros(5),
        "head.scale": torch.zeros(()),
        "basis.none": torch.zeros(0, 4),
    }
)
CONTRACT = TABLE.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")


class Hostile(torch.Tensor):
    """A tensor that answers nothing."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory is gone."""
    own = tensor.clone()
    own.untyped_storage().resize_(0)
    return own


def inside(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, in the middle of a larger memory."""
    return torch.cat([torch.ones(7), tensor.reshape(-1), torch.ones(7)])[7:-7].view(tensor.shape)


def nested(layout: torch.layout) -> Any:
    return torch.nested.nested_tensor([torch.zeros(2)] * 2, layout=layout)


DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
ODD_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed": lambda t: t.t() if t.dim() == 2 else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "column by column": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "expanded": lambda t: torch.ones(()).expand(t.shape),
    "overlapping": lambda t: torch.ones(20).as_strided(t.shape, [1] * t.dim()),
    "inside a larger memory": inside,
    "without memory": shrunk,
    "negative view": lambda t: torch._neg_view(t),
    "one dimension more": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
    "a number": lambda t: torch.tensor(1.0),
    "empty": lambda t: torch.zeros(0),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "rows": lambda t: torch.ones(2, 3).to_sparse_csr(),
    "nested": lambda t: nested(torch.strided),
    "jagged": lambda t: nested(torch.jagged),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "of one library": lambda t: t.to_mkldnn() if t.numel() and t.dim() else t,
    "asks for gradients": lambda t: t.clone().requires_grad_(),
    "has a graph": lambda t: t.clone().requires_grad_() * 2,
    "a parameter": lambda t: torch.nn.Parameter(t.clone()),
    "a subclass": lambda t: t.as_subclass(Hostile),
    "an array": lambda t: t.numpy(),
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "text": lambda t: "tensor",
}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.lists(st.integers()),
    st.sampled_from(
        [10**5000, -(10**400), math.nan, -0.0, np.float64(1), np.int64(1), np.nan, torch.ones(2)]
    ),
    st.builds(object),
)
NAMES = st.one_of(
    st.sampled_from([*TABLE, "private.lora.m.A", "private.", "LORA.m.A", "lora.m.A ", "\ud800"]),
    st.text(),
    st.integers(),
    st.none(),
    st.just(10**5000),
    st.tuples(st.integers()),
)
FLOATS = st.floats(width=32)
KINDS = ["whole", "field", "names", "scale", "odd", "dtype", "scaled", "entry"]


@functools.cache
def honest(client_id: str, round_number: int) -> ClientUpdate:
    generator = torch.Generator().manual_seed(10 * round_number + CLIENTS.index(client_id))
    delta = {n: 0.01 * torch.randn(p.shape, generator=generator) for n, p in TABLE.items()}
    return CONTRACT.build(client_id, round_number, 7, 2.0, delta)


@st.composite
def changed(draw: st.DrawFn, update: ClientUpdate) -> Any:
    """The update with one thing changed: a field, a name, a tensor or its values."""
    kind = draw(st.sampled_from(KINDS))
    delta = dict(update.delta)
    name = draw(st.sampled_from(list(delta)))
    tensor = delta[name]
    if kind == "whole":
        return draw(ANYTHING)
    if kind == "field":
        field = draw(st.sampled_from([f.name for f in dataclasses.fields(ClientUpdate)]))
        return dataclasses.replace(update, **{field: draw(ANYTHING)})
    if kind == "names":
        moved = delta.pop(name)
        for _ in range(draw(st.integers(0, 3))):
            delta[draw(NAMES)] = moved  # type: ignore[index]
    elif kind == "scale":
        factor = draw(FLOATS)
        delta = {n: t * factor for n, t in delta.items()}
    else:
        with contextlib.suppress(RuntimeError, TypeError):  # not every tensor can be all of these
            delta[name] = draw(changed_tensor(kind, tensor))
    return dataclasses.replace(update, delta=delta)


@st.composite
def changed_tensor(draw: st.DrawFn, kind: str, tensor: torch.Tensor) -> Any:
    if kind == "odd":
        return ODD_TENSORS[draw(st.sampled_from(list(ODD_TENSORS)))](tensor)
    if kind == "dtype":
        return torch.empty(tensor.shape, dtype=draw(st.sampled_from(DTYPES)))
    if kind == "scaled":
        return tensor * draw(FLOATS)
    flat = tensor.clone().reshape(-1)
    if len(flat):
        flat[draw(st.integers(0, len(flat) - 1))] = draw(FLOATS)
    return flat.view(tensor.shape)


def is_plain(tensor: Any) -> bool:
    """Whether it can be changed further; reading a tensor without memory ends the process."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        return False
    has_memory = tensor.untyped_storage().nbytes() > 0 or tensor.numel() == 0
    return tensor.is_cpu and tensor.dtype is torch.float32 and has_memory


@st.composite
def updates_of(draw: st.DrawFn, round_number: int) -> list[Any]:
    """What arrives in a round: each update is honest, or changed up to three times."""
    arrived: list[Any] = []
    for client_id in CLIENTS:
        update: Any = honest(client_id, round_number)
        for _ in range(draw(st.integers(0, 3))):
            if type(update) is ClientUpdate and isinstance(update.delta, dict):
                plain = all(is_plain(tensor) for tensor in update.delta.values())
                update = draw(changed(update)) if plain and update.delta else update
        arrived.append(update)
    return arrived


CONFIGS = [
    FederationConfig(
        num_rounds=10,
        cohort_size=len(CLIENTS),
        server=ServerConfig(
            optimizer=optimizer, aggregator=aggregator, weighting=weighting, warmup_rounds=0
        ),
        stages=stages,
    )
    for optimizer in ServerOptimizer
    for aggregator in Aggregation
    for weighting in Weighting
    for stages in ((), (StageConfig(clip=ClipConfig(norm=0.05)),))
]


@functools.cache
def state_after(place: int, num_rounds: int) -> dict[str, torch.Tensor]:
    """The state of a server of `CONFIGS` after honest rounds."""
    server = Server(TABLE, CONTRACT, CLIENTS, CONFIGS[place], seed=0)
    for round_number in range(1, num_rounds + 1):
        updates = server.new_aggregator()
        for client_id in CLIENTS:
            assert server.receive(updates, honest(client_id, round_number))
        server.aggregate(updates)
    return server.state_tensors()


def server_of(place: int, num_rounds: int) -> Server:
    server = Server(TABLE, CONTRACT, CLIENTS, CONFIGS[place], seed=0)
    server.load_state_tensors(state_after(place, num_rounds), num_rounds)
    return server


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_update_raises_and_a_refused_one_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = Counter({"inputs": 0, "refused": 0, "untyped_errors": 0})
    monkeypatch.setattr("pfm_llm.server.server._LOG.disabled", True)

    def received(server: Server, arrived: list[Any]) -> tuple[Any, list[Any]]:
        """The round's updates, and those of them that were accepted."""
        updates, accepted = server.new_aggregator(), []
        for update in arrived:
            before = server.state_tensors()
            try:
                good = server.receive(updates, update)
            except BaseException:
                counts["untyped_errors"] += 1
                raise
            accepted += [update] if good else []
            counts.update(inputs=1, refused=not good)
            assert equal(server.state_tensors(), before)
        return updates, accepted

    @hostile(short=100, long=-(-NUM_INPUTS // len(CLIENTS)))
    @given(
        place=st.integers(0, len(CONFIGS) - 1),
        before=st.sampled_from(ROUNDS_BEFORE),
        data=st.data(),
    )
    def check(place: int, before: int, data: st.DataObject) -> None:
        server, twin = server_of(place, before), server_of(place, before)
        arrived = data.draw(updates_of(before + 1))
        updates, accepted = received(server, arrived)
        summary = server.aggregate(updates)
        alone = twin.new_aggregator()
        assert all(twin.receive(alone, update) for update in accepted)
        twin.aggregate(alone)
        state = server.state_tensors()
        assert equal(state, twin.state_tensors())
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())
        assert math.isfinite(summary.update_norm)
        assert sum(summary.refused_by_reason.values()) == len(arrived) - len(accepted)

    try:
        check()
    finally:
        report("updates", counts)
