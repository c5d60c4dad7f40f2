"""Private LoRA: names, shapes and draws of both kinds, and the factors that the pass takes."""

from typing import Any

import pytest
import torch

from pfm_llm.config.model import AdaptersConfig, HeadConfig, PrivateAdapterConfig
from pfm_llm.model.private import PrivatePart, make_private_part
from pfm_llm.model.private.lora import random_a
from pfm_llm.protocol.parameters import Sizes
from tests.support.tables import config_of, drawn
from tests.support.tiny_models import stirred

MODULES = {"layers.2.k_proj": (32, 16), "layers.3.k_proj": (32, 16)}
HIDDEN, DIM = 32, 5


def _part(seed: int = 0, **settings: Any) -> PrivatePart:
    sizes = Sizes(HIDDEN, MODULES, num_items=7)
    private = PrivateAdapterConfig.model_validate(
        {"kind": "independent", "rank": 3, "head_rank": 2, **settings}
    )
    config = config_of(HeadConfig(dim=DIM), AdaptersConfig(private=private), seed=seed)
    return make_private_part(config, sizes)


def _bases(part: PrivatePart) -> dict[str, torch.Tensor]:
    return drawn(part.shared_parameters())


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_an_independent_client_keeps_both_factors() -> None:
    part = _part()
    assert _shapes(part.initial("u")) == {
        **{f"private.lora.{module}.A": (3, 32) for module in MODULES},
        **{f"private.lora.{module}.B": (16, 3) for module in MODULES},
        "private.head.A": (2, HIDDEN),
        "private.head.B": (DIM, 2),
    }
    assert part.shared_parameters() == []
    assert not any("head" in name for name in _part(head_rank=0).initial("u"))
    assert not any("lora" in name for name in _part(on_layers=False).initial("u"))


def test_with_a_shared_basis_a_client_keeps_no_factor_a() -> None:
    part = _part(kind="shared_basis")
    assert _shapes(part.initial("u")) == {
        **{f"private.lora.{module}.B": (16, 3) for module in MODULES},
        "private.head.B": (DIM, 2),
    }
    bases = _bases(part)
    assert _shapes(bases) == {
        **{f"basis.{module}.A": (3, 32) for module in MODULES},
        "basis.head.A": (2, HIDDEN),
    }
    assert all(value.any() for value in bases.values())


def test_a_part_that_is_switched_off_has_no_tensors() -> None:
    part = _part(kind="shared_basis", enabled=False)
    assert (part.shared_parameters(), part.initial("u")) == ([], {})
    assert not part.takes_steps
    assert part.factors(next(iter(MODULES)), {}, 1.0) is None


@pytest.mark.parametrize("kind", ["independent", "shared_basis"])
def test_at_the_start_nothing_is_changed_and_nobody_is_active(kind: str) -> None:
    part = _part(kind=kind)
    first = part.initial("u")
    assert not any(value.any() for name, value in first.items() if name.endswith(".B"))
    stacked = {name: torch.stack([value, value + 1]) for name, value in first.items()}
    assert part.active(stacked).tolist() == [False, True]


def test_same_seed_same_bits_and_every_client_and_seed_its_own() -> None:
    first, again = (_part().initial("a") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (_part().initial("b"), _part(seed=1).initial("a")):
        assert not any(torch.equal(first[n], other[n]) for n in first if n.endswith(".A"))
    module = next(iter(MODULES))
    shared = random_a(3, 32, 0, f"shared/{module}")
    assert not torch.equal(first[f"private.lora.{module}.A"], shared)


@pytest.mark.parametrize("kind", ["independent", "shared_basis"])
def test_factors_carry_scale_and_weight(kind: str) -> None:
    part = _part(kind=kind, alpha=6)  # 6 / 3 = 2
    tensors = stirred({**_bases(part), **part.initial("u")}, 1)
    module = next(iter(MODULES))
    (a, b), (head_a, head_b) = (
        factors
        for factors in (part.factors(module, tensors, 0.5), part.head_factors(tensors, 0.5))
        if factors is not None
    )
    torch.testing.assert_close(b, tensors[f"private.lora.{module}.B"])  # 2 * 0.5 = 1
    torch.testing.assert_close(head_b, tensors["private.head.B"] * 0.5)
    owner = "private.lora." if kind == "independent" else "basis."
    assert torch.equal(a, tensors[f"{owner}{module}.A"])
    assert torch.equal(head_a, tensors[f"{owner.removesuffix('lora.')}head.A"])
    assert part.factors("no.such.module", tensors, 1.0) is None
