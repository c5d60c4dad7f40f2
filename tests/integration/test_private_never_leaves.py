"""No private tensor is in anything that leaves a client; a build that leaks is caught.

The bytes of each client's actual private tensors, of their copies in other dtypes and of their
changes are looked for, after every round, in all that crosses a boundary: updates, what
processes exchange, logs, trackers, and every file of the public run folder.
"""

import base64
import contextlib
import dataclasses
import json
import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.base import files
from pfm_llm.client import private_steps
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.data.history import History
from pfm_llm.protocol.types import ClientUpdate, PrivateState
from pfm_llm.publish.export import Exported
from pfm_llm.runs import report
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import assemble, load_corpus
from pfm_llm.server.server import Server
from tests.support.leaks import DTYPES, RUN, Hunt, files_below
from tests.support.peft_reference import load_private
from tests.support.tiny import TITLES, Tiny, alone
from tests.support.watch import Watch

ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "federation__num_rounds": ROUNDS,
    "federation__local__private_local_steps": 2,
    "evaluation__every": 1,
    "evaluation__splits": ["validation", "test"],
    "output__checkpoint_every": 1,
    "runtime__trackers": ["tensorboard"],
    # About one client to a chunk, so that a sum over a chunk hides nothing.
    "runtime__tokens_per_chunk": 60,
}


@contextlib.contextmanager
def watched(config: Any, patch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Run an experiment under watch; leaks must be installed before."""
    watch = Watch(Path(config.output.dir) / config.name, patch)
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    logging.getLogger("pfm_llm").setLevel(logging.DEBUG)
    try:
        run_experiment(config)
        watch.search()
        yield watch
    finally:
        logger.removeHandler(watch)
        logger.setLevel(level)
        logging.getLogger("pfm_llm").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def tiny(tiny: Tiny) -> Tiny:
    """Clients that cache trunk states: what they must keep for themselves, and may lose."""
    return tiny.by_tokens


@pytest.fixture(scope="module", params=list(PRIVATE_KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run_folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(kind) / "tiny"


@pytest.fixture(scope="module")
def watch(tiny: Tiny, kind: str, run_folder: Path) -> Iterator[Watch]:
    # A private LoRA that is read off the history is trained at home as well.
    steps = {"adapters__private__steps": 3} if kind == "hyper_lora" else {}
    config = tiny.config(run_folder.parent, adapters__private__kind=kind, **SETTINGS, **steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_steps, "RATE", 1e4)  # few rounds leave a LoRA of small factors
        with watched(config, patch) as watch:
            yield watch


def test_no_private_tensor_is_in_anything_that_leaves_a_client(watch: Watch) -> None:
    assert watch.found == {}
    assert watch.searches == list(range(1, ROUNDS + 1))


def test_no_private_tensor_leaves_by_default(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method pfm, whose layers read items."""
    by_items = dataclasses.replace(tiny, reading="items")
    settings = {**SETTINGS, "method": "pfm", "federation__local__private_local_steps": 0}
    with watched(by_items.config(tmp_path, **settings), monkeypatch) as watch:
        assert watch.found == {}
        assert watch.searches == list(range(1, ROUNDS + 1))
    assert not list((tmp_path / "tiny.private").rglob("trunk"))


def test_no_private_tensor_leaves_under_masks(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in what is masked: whatever is in it, the sum shows."""
    masks = {"federation__masks": True, "federation__stages": [{"clip": {"norm": 4.0}}]}
    with watched(tiny.config(tmp_path, **SETTINGS, **masks), monkeypatch) as watch:
        assert watch.found == {}
        assert watch.searches == list(range(1, ROUNDS + 1))
        assert {"update", "masked update", "gather"} <= watch.searched


def test_every_boundary_was_searched(watch: Watch) -> None:
    files_wanted = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "results.md",
        "plots/user_gain.png",
        *(f"server/round_{number:06d}.safetensors" for number in range(1, ROUNDS + 1)),
        "shared_adapter/adapter_model.safetensors",
        "shared_adapter/recommender_head.safetensors",
        "shared_adapter/README.md",
    }
    assert {"update", "gather", "tracker", "log", *files_wanted} <= watch.searched
    assert any("events.out.tfevents" in name for name in watch.searched)


def test_the_private_tensors_were_not_zero_and_each_was_looked_for(
    watch: Watch, run_folder: Path
) -> None:
    # Every client was personalised for the last evaluation, so each has a state to look for.
    private = run_folder.with_name("tiny.private")
    assert len(watch.states) == 24
    for client_id, state in watch.states.items():
        kept = private / "clients" / client_id / f"personalised.r{ROUNDS:06d}.safetensors"
        assert kept.exists()
        in_own_file = watch.hunt.find(kept.read_bytes())
        for name, tensor in state.tensors.items():
            assert bool(tensor.any())
            is_long = tensor.numel() >= RUN  # a few numbers could be there by chance
            # The coefficients of the scores are the embedding: one name stands for equal numbers.
            alike = [n for n, other in state.tensors.items() if torch.equal(other, tensor)]
            labels = {f"{client_id}/{one} value float32" for one in alike}
            assert bool(labels & in_own_file) is is_long, name
    forms = {label.rsplit("/", 1)[1].split(" ", 1)[1] for label in watch.hunt.binary.labels()}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    wanted = {f"{what} {dtype}" for what in ("value", "delta") for dtype in dtypes}
    tensors = [tensor for state in watch.states.values() for tensor in state.tensors.values()]
    assert forms == (wanted if any(tensor.numel() >= RUN for tensor in tensors) else set())


def test_private_folder_is_apart_and_its_owners_alone(watch: Watch, run_folder: Path) -> None:
    folders = RunFolders.of(run_folder)
    assert folders.private.is_dir()
    assert not folders.private.is_relative_to(folders.public)
    assert not folders.public.is_relative_to(folders.private)
    for folder in (folders.private, *filter(Path.is_dir, folders.private.rglob("*"))):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    public_names = set(files_below(folders.public))
    assert not [name for name in public_names if "private." in name or "trunk" in name]


@pytest.fixture(scope="module")
def history_hunt(tiny: Tiny, run_folder: Path, watch: Watch) -> Hunt:
    """Looks for every user's items and tokens, and for the trunk states that reproduce them."""
    config = tiny.config(run_folder.parent)
    corpus = load_corpus(config)
    folders = RunFolders.of(run_folder.with_name("unused"))
    assembly = assemble(config, corpus, folders, alone())
    hunt = Hunt()
    for user in range(corpus.interactions.num_users):
        history = corpus.interactions.history(user)
        hunt.learn_integers(f"items of {user}", history)
        hunt.learn_integers(
            f"tokens of {user}", assembly.model.encoder.window(History(history)).tokens
        )
    private = run_folder.with_name("tiny.private")
    for number, path in enumerate(sorted(private.rglob("trunk/*.safetensors"))):
        # The first states are those of the header, alike for everybody; the last are the user's.
        states = files.read_tensors(path)[0]["states"][-2:]
        hunt.learn("trunk", {f"{number}": states})
    return hunt


def test_no_history_is_in_the_public_folder(history_hunt: Hunt, run_folder: Path) -> None:
    assert history_hunt.search(files_below(run_folder)) == {}
    labels = history_hunt.binary.labels()
    assert sum(label.startswith("tokens of") for label in labels) == 24 * 3  # three widths
    assert sum(label.startswith("trunk/") for label in labels) > 24
    text = b"".join(files_below(run_folder).values()).decode(errors="replace")
    assert not any(f"{title}\\n" in text or f"{title}\n" in text for title in TITLES)


def test_the_caches_do_hold_histories(
    history_hunt: Hunt, run_folder: Path, tmp_path: Path, tiny: Tiny
) -> None:
    # So they would be found, were they copied to where they must not be.
    private = run_folder.with_name("tiny.private")
    copied = next(private.rglob("trunk/*.safetensors")).read_bytes()
    assert any(label.startswith("trunk/") for label in history_hunt.find(copied))
    history = load_corpus(tiny.config(tmp_path)).interactions.history(0)
    assert history_hunt.find(json.dumps({"seen": history.tolist()}).encode())
    assert history_hunt.find(b"x" + history.astype(np.int32).tobytes())


# --- builds that leak -------------------------------------------------------------------------

Leak = Callable[[pytest.MonkeyPatch], None]
LOGGER = logging.getLogger("pfm_llm.client.trainer")


def after_training(patch: pytest.MonkeyPatch, leak: Callable[..., Any]) -> None:
    """Call ``leak(trainer, update)`` with each update; what it returns is sent."""
    train_chunk = LocalTrainer.train_chunk

    def leaky(trainer: LocalTrainer, *args: Any) -> list[ClientUpdate]:
        updates = train_chunk(trainer, *args)
        return [leak(trainer, update) or update for update in updates]

    patch.setattr(LocalTrainer, "train_chunk", leaky)


def private_of(trainer: LocalTrainer, update: ClientUpdate) -> dict[str, torch.Tensor]:
    state = trainer._store.load(update.client_id)
    assert state is not None
    return dict(state.tensors)


def some_a(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A draw of its client. All of B may be of one size after a step, and proves nothing then."""
    return next(value for name, value in tensors.items() if name.endswith("down_proj.A"))


def under_shared_names(patch: pytest.MonkeyPatch) -> None:
    """The classic: both adapters' state dicts have the same keys and shapes."""

    def leak(trainer: LocalTrainer, update: ClientUpdate) -> ClientUpdate:
        private = private_of(trainer, update)
        delta = {
            name: private.get(f"private.{name}", value) for name, value in update.delta.items()
        }
        return dataclasses.replace(update, delta=delta)

    after_training(patch, leak)


def change_under_shared_names(patch: pytest.MonkeyPatch) -> None:
    """Not the private tensors but how they changed."""

    def leak(trainer: LocalTrainer, update: ClientUpdate) -> ClientUpdate:
        private, first = private_of(trainer, update), trainer._private.initial(update.client_id)
        change = {name.removeprefix("private."): private[name] - first[name] for name in private}
        delta = {name: change.get(name, value) for name, value in update.delta.items()}
        return dataclasses.replace(update, delta=delta)

    after_training(patch, leak)


def in_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    after_training(patch, lambda trainer, update: seen.update(private_of(trainer, update)))
    state_tensors = Server.state_tensors
    patch.setattr(
        Server, "state_tensors", lambda server: {**state_tensors(server), "extra": some_a(seen)}
    )


def logged_as(form: Callable[[torch.Tensor], Any]) -> Leak:
    def install(patch: pytest.MonkeyPatch) -> None:
        after_training(
            patch,
            lambda trainer, update: LOGGER.debug("%s", form(some_a(private_of(trainer, update)))),
        )

    return install


def beside_the_export(write: Callable[[Path, Exported, PrivateState], Any]) -> Leak:
    def install(patch: pytest.MonkeyPatch) -> None:
        export = report.export_shared_adapter

        def leaky(what: Exported, folder: Path, *args: Any) -> None:
            export(what, folder, *args)
            store = PrivateStore(RunFolders.of(folder.parent).private)
            state = store.load_personalised(store.client_ids()[0])
            assert state is not None
            write(folder, what, state)

        patch.setattr(report, "export_shared_adapter", leaky)

    return install


def as_dtype(dtype: torch.dtype) -> Leak:
    def write(folder: Path, what: Exported, state: PrivateState) -> None:
        tensors = {name: value.to(dtype) for name, value in state.tensors.items()}
        files.write_tensors(folder / "optimizer.safetensors", tensors)

    return beside_the_export(write)


def as_json(folder: Path, what: Exported, state: PrivateState) -> None:
    numbers = {name: value.tolist() for name, value in state.tensors.items()}
    files.write_json(folder / "notes.json", numbers)


def naive_push(folder: Path, what: Exported, state: PrivateState) -> None:
    """What `save_pretrained` and `push_to_hub` write unless they are told otherwise."""
    model = what.parts.adapter.peft_model()
    tensors = {**what.parts.shared.tensors, **state.tensors}
    load_private(what.parts.adapter, model, what.parts.private, tensors)
    model.save_pretrained(str(folder))


def as_hex(tensor: torch.Tensor) -> str:
    return tensor.contiguous().numpy().tobytes().hex()


def as_base64(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def as_printed(tensor: torch.Tensor) -> str:
    """As torch prints it in its scientific form: in the other one, small numbers lose digits."""
    torch.set_printoptions(sci_mode=True)
    try:
        return repr(tensor)
    finally:
        torch.set_printoptions(profile="default")


@pytest.mark.parametrize(
    ("install", "places"),
    [
        pytest.param(under_shared_names, ("update", "gather"), id="wrong adapter sent"),
        pytest.param(change_under_shared_names, ("update", "gather"), id="wrong delta sent"),
        pytest.param(in_the_checkpoint, ("server/round_000001.safetensors",), id="checkpoint"),
        pytest.param(logged_as(as_hex), ("log",), id="log as hex"),
        pytest.param(logged_as(as_base64), ("log",), id="log as base64"),
        pytest.param(logged_as(torch.Tensor.tolist), ("log",), id="log as numbers"),
        pytest.param(logged_as(as_printed), ("log",), id="log as torch prints it"),
        pytest.param(beside_the_export(as_json), ("shared_adapter/notes.json",), id="JSON numbers"),
        *(
            pytest.param(as_dtype(dtype), ("shared_adapter/optimizer.safetensors",), id=f"{dtype}")
            for dtype in DTYPES
        ),
        pytest.param(
            beside_the_export(naive_push),
            ("shared_adapter/private/adapter_model.safetensors",),
            id="both adapters pushed",
        ),
    ],
)
def test_a_build_that_leaks_is_caught(
    install: Leak,
    places: tuple[str, ...],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    settings = {
        **SETTINGS,
        "federation__num_rounds": 1,
        "evaluation__every": 0,
        "evaluation__splits": ["test"],
        "evaluation__baselines": [],
        "data__max_users": 6,
        "runtime__trackers": [],
    }
    with watched(tiny.config(tmp_path, **settings), monkeypatch) as watch:
        assert set(places) <= watch.found.keys()
        for place in places:
            assert all(label.startswith("user-") for label in watch.found[place])
