"""llama.cpp with our GGUF LoRAs answers as PEFT does, mixed per request in one loaded model."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pfm_llm.publish.device.export import export_gguf
from tests.support.device import Folders, write_folders
from tests.support.tiny_gguf import write_base
from tests.support.tiny_models import TinyCohort, make_cohort

pytest.importorskip("xllamacpp", reason="the extra [device] is not installed")
pytestmark = pytest.mark.slow

from benchmarks.device_llama import Llama, dequantise  # noqa: E402

ANSWERS = (11, 23)
HISTORY = [3, 50, 7, 8, 61]
PROMPTS = [[*HISTORY, *piece] for piece in ([5, 6, 90], [40, 2], [9, 1, 17, 33, 4])]
MIXTURES = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.5)]


@pytest.fixture(scope="module")
def cohort() -> TinyCohort:
    return make_cohort(shared={"rank": 3, "alpha": 4, "use_rslora": True})


@pytest.fixture(scope="module")
def folders(cohort: TinyCohort, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_folders(cohort, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def base(cohort: TinyCohort, folders: Folders) -> Path:
    return write_base(folders.root / "base.gguf", cohort.backbone.model)


@pytest.fixture(scope="module")
def peft(cohort: TinyCohort, folders: Folders) -> Any:
    model = copy.deepcopy(cohort.backbone.model)
    peft = PeftModel.from_pretrained(model, str(folders.shared), adapter_name="shared")
    peft.load_adapter(str(folders.private), adapter_name="private")
    peft.base_model.set_adapter(["shared", "private"])
    return peft.eval()


@torch.no_grad()
def expected(peft: Any, mixture: tuple[float, float]) -> list[float]:
    """What PEFT answers with both LoRAs active, each with its factor."""
    layers = [module for module in peft.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 2 * 7
    scales = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name, factor in zip(("shared", "private"), mixture, strict=True):
            layer.scaling[name] *= factor
    logits = [peft(input_ids=torch.tensor([one])).logits[0, -1] for one in PROMPTS]
    for layer, before in zip(layers, scales, strict=True):
        layer.scaling.update(before)
    return [float(one[ANSWERS[0]] - one[ANSWERS[1]]) for one in logits]


def test_requests_to_one_model_mix_its_loras(base: Path, folders: Folders, peft: Any) -> None:
    """One after another, whose history is read once, and then all at the same time."""
    files = export_gguf(folders.shared, folders.private, folders.root / "device", base)
    wanted = {mixture: expected(peft, mixture) for mixture in MIXTURES}
    assert len({round(odds[0], 3) for odds in wanted.values()}) == len(MIXTURES)
    for slots in (1, 3):
        llama = Llama(base, files, slots, exact=True)

        def ask(mixture: tuple[float, float], llama: Llama = llama) -> list[float]:
            return llama.log_odds(PROMPTS, ANSWERS, dict(enumerate(mixture)))

        with ThreadPoolExecutor(slots) as pool:
            for mixture, odds in zip(MIXTURES * 2, pool.map(ask, MIXTURES * 2), strict=True):
                assert odds == pytest.approx(wanted[mixture], abs=2e-3), (slots, mixture)


def test_nothing_that_another_lora_has_computed_is_used(
    base: Path, folders: Folders, peft: Any
) -> None:
    """A prompt comes back to a slot that has the LoRA by now, and had another one then."""
    files = export_gguf(folders.shared, folders.private, folders.root / "again", base)
    llama, longer = Llama(base, files, exact=True), [[70, *PROMPTS[0]] * 2]
    llama.log_odds(PROMPTS[-1:], ANSWERS, {0: 1.0})
    llama.log_odds(longer, ANSWERS, {1: 1.0})
    odds = llama.log_odds(PROMPTS[-1:], ANSWERS, {1: 1.0})
    assert odds == pytest.approx(expected(peft, (0.0, 1.0))[-1:], abs=2e-3)


def test_one_file_of_both_answers_as_both(base: Path, folders: Folders, peft: Any) -> None:
    files = export_gguf(folders.shared, folders.private, folders.root / "cat", base, cat=True)
    odds = Llama(base, files, exact=True).log_odds(PROMPTS, ANSWERS, {0: 1.0})
    assert odds == pytest.approx(expected(peft, (1.0, 1.0)), abs=2e-3)


def test_a_copy_in_float32_answers_as_the_file_does(base: Path, tmp_path: Path) -> None:
    dequantise(base, tmp_path / "copy.gguf")
    one, other = (
        Llama(path, [], exact=True).log_odds(PROMPTS, ANSWERS, {})
        for path in (base, tmp_path / "copy.gguf")
    )
    assert one == other
