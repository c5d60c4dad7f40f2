"""Stages of updates: their order on both sides, and the clip."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError
from pfm_llm.base.seeding import generator
from pfm_llm.config.stages import ClipConfig, StageConfig
from pfm_llm.protocol import stages
from pfm_llm.protocol.stages import STAGES, Stages
from pfm_llm.protocol.stages.clip import Clip
from pfm_llm.protocol.stages.stage import StageContext, UpdateStage
from pfm_llm.protocol.types import Tensors

CONTEXT = StageContext(seed=0, round_number=1, cohort_size=8, client_id="u1")


def delta_of(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = {"lora.m.A": (2, 3), "head.item_bias": (4,)}
    return {name: scale * torch.randn(s, generator=source) for name, s in shapes.items()}


def norm_of(delta: Tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in delta.values()))


def equal(first: Tensors, second: Tensors) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_norm_is_over_all_tensors_together() -> None:
    delta = {"lora.m.A": torch.tensor([[3.0]]), "head.item_bias": torch.tensor([0.0, 4.0])}
    clipped = Clip(2.5).on_client(delta, CONTEXT)  # norm 5, so half remains
    assert clipped["lora.m.A"].item() == pytest.approx(1.5, rel=1e-5)
    assert clipped["head.item_bias"].tolist() == pytest.approx([0.0, 2.0], rel=1e-5)
    assert Clip(5.0).on_client(delta, CONTEXT) is delta


@given(seed=st.integers(0, 999), scale=st.floats(1e-6, 1e30), bound=st.floats(1e-3, 1e3))
def test_no_clipped_update_exceeds_the_bound_and_clipping_twice_is_clipping_once(
    seed: int, scale: float, bound: float
) -> None:
    delta, clip = delta_of(seed, scale), Clip(bound)
    once = clip.on_client(delta, CONTEXT)
    assert norm_of(once) <= bound
    assert norm_of(once) == pytest.approx(min(bound, norm_of(delta)), rel=1e-5)
    assert all(tensor.dtype is torch.float32 for tensor in once.values())
    twice, arrived = clip.on_server(once, CONTEXT)
    assert equal(twice, once)
    assert arrived == pytest.approx(norm_of(once))


def test_clipping_leaves_its_argument_and_the_direction() -> None:
    delta = delta_of(0, 100.0)
    clipped = Clip(1.0).on_client(delta, CONTEXT)
    assert equal(delta, delta_of(0, 100.0))
    ratio = torch.cat([(clipped[name] / delta[name]).flatten() for name in delta])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_that_the_server_refuses_it(value: float) -> None:
    delta = {**delta_of(0), "head.item_bias": torch.full((4,), value)}
    assert Clip(1.0).on_client(delta, CONTEXT) is delta


def test_the_clip_reports_who_stands_at_the_bound_and_the_norms_that_arrived() -> None:
    clip = Clip(1.0)
    at_home = clip.on_client(delta_of(0, 50.0), CONTEXT)
    small = {"lora.m.A": torch.tensor([0.25])}
    honest = [clip.on_server(delta, CONTEXT)[1] or 0.0 for delta in (small, small, at_home)]
    assert clip.summary(honest) == {
        "clipped": 1,
        "median_norm": 0.25,
        "largest_norm": pytest.approx(1.0, rel=1e-5),
    }
    liar = clip.on_server({"lora.m.A": torch.tensor([8.0])}, CONTEXT)[1] or 0.0
    assert clip.summary([*honest, liar])["clipped"] == 2
    assert clip.summary([*honest, liar])["largest_norm"] == 8.0


class Trace(UpdateStage):
    """Writes a digit behind each number, so that the order of stages shows."""

    def __init__(self, digit: int) -> None:
        self.digit = digit

    def on_client(self, delta: Tensors, context: StageContext) -> Tensors:
        return {name: 10 * tensor + self.digit for name, tensor in delta.items()}

    def on_server(self, delta: Tensors, context: StageContext) -> tuple[Tensors, float | None]:
        return self.on_client(delta, context), float(self.digit)

    def on_aggregate(self, aggregate: Tensors, context: StageContext) -> Tensors:
        return self.on_client(aggregate, context)

    def summary(self, noted: Sequence[float]) -> Mapping[str, float]:
        return {"total": sum(noted)}


class Noise(UpdateStage):
    """A stage as a later one may be: on the aggregate alone, drawn from the context."""

    def on_aggregate(self, aggregate: Tensors, context: StageContext) -> Tensors:
        draw = generator(context.seed, "noise", context.round_number, context.client_id)
        return {
            name: tensor + torch.randn(tensor.shape, generator=draw) / context.cohort_size
            for name, tensor in aggregate.items()
        }


@pytest.fixture
def own_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**STAGES, "first": lambda: Trace(1), "second": lambda: Trace(2), "noise": Noise}
    monkeypatch.setattr(stages, "STAGES", known)


@pytest.mark.usefixtures("own_stages")
def test_the_server_runs_the_stages_in_reverse() -> None:
    both = Stages([("first", {}), ("second", {})], seed=0, cohort_size=8)
    zero = {"lora.m.A": torch.tensor(0.0)}
    assert both.on_client(zero, "u1", 1)["lora.m.A"] == 12
    delta, noted = both.on_server(zero, "u1", 1)
    assert delta["lora.m.A"] == 21
    assert noted == {"first": 1.0, "second": 2.0}
    assert both.on_aggregate(zero, 1)["lora.m.A"] == 12
    assert both.summary({"first": [1.0, 1.0], "second": []}) == {"first": {"total": 2.0}}


@pytest.mark.usefixtures("own_stages")
def test_a_stage_of_one_hook_leaves_the_others_alone_and_draws_the_same_on_each_process() -> None:
    one, other = (Stages([("noise", {})], seed=3, cohort_size=8) for _ in range(2))
    delta = delta_of(0)
    assert one.on_client(delta, "u1", 1) is delta
    assert one.on_server(delta, "u1", 1) == (delta, {})
    assert one.summary({}) == {}
    assert equal(one.on_aggregate(delta, 1), other.on_aggregate(delta, 1))
    assert not equal(one.on_aggregate(delta, 1), one.on_aggregate(delta, 2))


def test_no_stages_change_nothing() -> None:
    none, delta = Stages([], seed=0, cohort_size=8), delta_of(0)
    assert none.on_client(delta, "u1", 1) is delta
    assert none.on_server(delta, "u1", 1) == (delta, {})
    assert none.on_aggregate(delta, 1) is delta
    assert none.summary({}) == {}


def test_every_stage_of_the_config_has_its_class() -> None:
    assert STAGES.keys() == StageConfig.model_fields.keys()
    name, settings = StageConfig(clip=ClipConfig(norm=2.0)).choice
    assert STAGES[name](**settings) == Clip(2.0)


@pytest.mark.usefixtures("own_stages")
def test_under_masks_no_stage_may_look_at_single_updates() -> None:
    Stages([("clip", {"norm": 1.0}), ("noise", {})], 0, 8).check_masked()
    with pytest.raises(ConfigError, match="stages: first looks at single updates at the server"):
        Stages([("clip", {"norm": 1.0}), ("first", {})], 0, 8).check_masked()
