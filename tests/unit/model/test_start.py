"""What a model starts from: the tensors of an adapter, held against the table of the config."""

import dataclasses

import pytest
import torch

from pfm_llm.base.errors import ArtefactError
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.model.start import Start
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import Tensors
from pfm_llm.text.prompts import load_prompt
from tests.support.tables import table_of

PROMPT = load_prompt("next_item.v1")
OURS = {"lora.q.A": torch.zeros(2, 3), "head.x": torch.zeros(4), "basis.new.A": torch.ones(5)}


def _start(tensors: Tensors) -> Start:
    hashes = {"weights_hash": "w", "tokenizer_hash": "t", "prompt_hash": PROMPT.content_hash()}
    return Start(
        origin="some/adapter",
        base_name="some/base",
        prompt=PROMPT.key,
        normalisers=(Normaliser(torch.zeros(3), torch.eye(3)),) * 2,
        item_encoder=None,
        tensors=tensors,
        settings={"head": {"dim": 8}},
        **hashes,
    )


def test_a_basis_that_the_adapter_lacks_starts_anew_and_an_unused_one_is_left_out() -> None:
    theirs = {
        "head.x": torch.full((4,), 2.0),
        "lora.q.A": torch.full((2, 3), 2.0),
        "basis.old.A": torch.ones(7),
    }
    found = _start(theirs).shared(table_of(OURS), PROMPT).tensors
    assert list(found) == list(OURS)
    assert found["lora.q.A"] is theirs["lora.q.A"]
    assert torch.equal(found["basis.new.A"], OURS["basis.new.A"])


@pytest.mark.parametrize(
    ("name", "theirs", "message"),
    [
        ("head.x", None, r"head\.x is absent there and \[4\] here"),
        ("head.x", torch.zeros(5), r"head\.x is \[5\] there and \[4\] here"),
        ("head.y", torch.zeros(5), r"head\.y is \[5\] there and absent here.*\{head: \{dim: 8\}\}"),
        ("basis.new.A", torch.zeros(6), r"basis\.new\.A is \[6\] there and \[5\] here"),
    ],
)
def test_other_tensors_than_the_config_s_are_refused(
    name: str, theirs: torch.Tensor | None, message: str
) -> None:
    tensors = {n: t for n, t in {**OURS, name: theirs}.items() if t is not None}
    with pytest.raises(ArtefactError, match=message):
        _start(tensors).shared(table_of(OURS), PROMPT)


def test_another_prompt_is_refused() -> None:
    start = dataclasses.replace(_start(OURS), prompt_hash="other")
    with pytest.raises(ArtefactError, match="was trained with prompt"):
        start.shared(ParameterTable([]), PROMPT)
