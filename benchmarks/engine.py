"""Race the many-clients pass against PEFT, one client at a time, on the embedded model and data.

A client step is the loss of one window of 32 items over the whole catalogue, and its gradients
in the client's shared LoRA, private LoRA and recommender head. Three cases take it:

- stacked_cached: many clients in one pass over cached trunk states, which are read from disk;
- peft_same_layers: PEFT, the same adapted layers, from tokens;
- peft_common_recipe: PEFT, LoRA on all linear layers of all blocks, from tokens.

Repeats alternate between the cases, so that whatever else the machine does hits all alike. The
first two compute the same thing, which is checked before the clock starts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    import torch

    from benchmarks.sequential_peft import SequentialPeft
    from pfm_llm.config.schema import ExperimentConfig
    from pfm_llm.runs.run import Run
    from pfm_llm.text.encoding import Window

STACKED, SAME_LAYERS, COMMON_RECIPE = "stacked_cached", "peft_same_layers", "peft_common_recipe"
UNIT = "client_steps_per_s"
_SEED = 0
_LOSS_TOLERANCE = 0.02
_GRADIENT_TOLERANCE = 0.15

Step = tuple["torch.Tensor", dict[str, "torch.Tensor"]]
"""A client's loss, and its gradients by name."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each case")
    parser.add_argument("--clients", type=int, default=16, help="clients with a window each")
    parser.add_argument(
        "--num-layers", type=int, default=None, help="adapted layers (default: the config's)"
    )
    parser.add_argument("--threads", type=int, default=None, help="default: all usable cores")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine.json")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.clients) < 1:
        parser.error("--repeats and --clients must be at least 1")
    from pfm_llm.base.errors import PfmError
    from pfm_llm.cli.start import prepare

    prepare()  # before torch starts

    try:
        run(arguments)
    except PfmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def run(arguments: argparse.Namespace) -> None:
    """Set up, check, race, write the result and print it."""
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.runs.environment import environment

    processes = start_processes(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = bench_config(arguments.num_layers, folder)
        bench = Bench.build(config, arguments.clients, processes)
        seconds_to_fill = bench.fill_trunk_cache()
        agreement = bench.check()
        seconds = race(bench.cases(), arguments.repeats)
    here = environment(
        seed=config.seed,
        dtype=str(bench.experiment.model.backbone.dtype).removeprefix("torch."),
        threads=processes.threads,
        num_processes=processes.count,
        device=processes.device.type,
    )
    result = {
        "rows": rows(seconds, arguments.clients),
        "ratios": ratios(seconds),
        "agreement": agreement,
        "trunk_cache_fill_s_per_client": round(seconds_to_fill / arguments.clients, 4),
        "config": bench.describe(),
        "environment": here
        | {name.lower(): os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }
    files.write_json(arguments.out, result)
    print(table(result))


def bench_config(num_layers: int | None, folder: str) -> "ExperimentConfig":
    """LoRA alone, shared and private, on one window of 32 items of each client.

    Args:
        num_layers: Adapted layers; None: the default.
        folder: Where trunk states go.
    """
    from pfm_llm.config.schema import parse_config

    return parse_config(
        {
            "name": "engine",
            "seed": _SEED,
            "method": "custom",
            "window": {"items": 32, "max_windows": 1},
            "adapters": {"private": {"kind": "independent"}}
            | ({} if num_layers is None else {"num_layers": num_layers}),
            "head": {"dropout": 0.0},
            "federation": {"local": {"schedule": "alternate"}},
            "output": {"dir": folder},
        },
        origin="benchmarks/engine.py",
    )


@dataclass(frozen=True)
class Bench:
    """Everything that is made before the clock starts.

    Attributes:
        experiment: The experiment's objects, those of a real run.
        clients: Client ids.
        windows: Of each client its window.
        tensors: Of each client its shared and private tensors.
        wide_tensors: The same for LoRA in all layers.
        same_layers: The reference with the same adapted layers.
        common_recipe: The reference with all layers adapted.
    """

    experiment: "Run"
    clients: tuple[str, ...]
    windows: "tuple[Window, ...]"
    tensors: tuple[dict[str, "torch.Tensor"], ...]
    wide_tensors: tuple[dict[str, "torch.Tensor"], ...]
    same_layers: "SequentialPeft"
    common_recipe: "SequentialPeft"

    @classmethod
    def build(cls, config: "ExperimentConfig", num_clients: int, processes: Any) -> "Bench":
        """Load model and data, choose the clients, and set up both references."""
        from benchmarks.sequential_peft import SequentialPeft
        from pfm_llm.model.lora import DualAdapter
        from pfm_llm.runs.folders import RunFolders
        from pfm_llm.runs.run import assemble, load_corpus

        folders = RunFolders.of(Path(config.output.dir) / config.name)
        experiment = assemble(config, load_corpus(config), folders, processes)
        clients = choose_clients(experiment, num_clients)
        wide = DualAdapter(
            experiment.model.backbone,
            config.adapters.model_copy(update={"num_layers": experiment.model.backbone.num_layers}),
        )
        items = experiment.model.model.item_texts
        return cls(
            experiment=experiment,
            clients=clients,
            windows=tuple(experiment.clients.histories.windows(client)[0] for client in clients),
            tensors=client_tensors(experiment, experiment.model.adapter, clients),
            wide_tensors=client_tensors(experiment, wide, clients),
            same_layers=SequentialPeft(
                experiment.model.backbone,
                experiment.model.adapter,
                experiment.model.normaliser,
                items,
            ),
            common_recipe=SequentialPeft(
                experiment.model.backbone, wide, experiment.model.normaliser, items
            ),
        )

    def cases(self) -> dict[str, Callable[[], object]]:
        """Each case as a call that takes one step of every client."""
        return {
            STACKED: self.stacked,
            SAME_LAYERS: lambda: self.sequential(self.same_layers, self.tensors),
            COMMON_RECIPE: lambda: self.sequential(self.common_recipe, self.wide_tensors),
        }

    def fill_trunk_cache(self) -> float:
        """Compute every client's trunk states, as happens once in a run; returns the seconds."""
        started = time.perf_counter()
        for client in self.clients:
            self.experiment.clients.histories.trunk_states(client)
        return time.perf_counter() - started

    def stacked(self) -> list[Step]:
        """One step of every client in the many-clients pass, chunked as a run chunks."""
        tensors = dict(zip(self.clients, self.tensors, strict=True))
        steps: dict[str, Step] = {}
        for chunk in self.experiment.clients.trainer.chunks(self.clients):
            steps |= zip(chunk, self._stacked_chunk(chunk, tensors), strict=True)
        return [steps[client] for client in self.clients]

    def sequential(
        self, reference: "SequentialPeft", tensors: Sequence[Mapping[str, "torch.Tensor"]]
    ) -> list[Step]:
        """One step of every client with a reference."""
        pairs = zip(self.windows, tensors, strict=True)
        return [reference.client_step(window, own) for window, own in pairs]

    def check(self) -> dict[str, float]:
        """Warm everything up, and see that the first two cases compute the same.

        Returns:
            Largest relative difference over the clients of the loss, and of all gradients
            together (Euclidean norm).

        Raises:
            TrainingError: They differ by more than the dtype's rounding explains.
        """
        from benchmarks.sequential_peft import relative_difference
        from pfm_llm.base.errors import TrainingError

        self.common_recipe.client_step(self.windows[0], self.wide_tensors[0])
        pairs = list(
            zip(self.stacked(), self.sequential(self.same_layers, self.tensors), strict=True)
        )
        loss = max(abs(float(a[0] - b[0])) / abs(float(b[0])) for a, b in pairs)
        gradient = max(relative_difference(a[1], b[1]) for a, b in pairs)
        if not (loss < _LOSS_TOLERANCE and gradient < _GRADIENT_TOLERANCE):
            raise TrainingError(
                f"{STACKED} and {SAME_LAYERS} differ by {loss:.2g} in the loss and {gradient:.2g} "
                "in the gradients: a race between them would mean nothing; run the tests"
            )
        return {"loss": loss, "gradient": gradient}

    def describe(self) -> dict[str, Any]:
        """What was raced, in plain JSON types."""
        config, lengths = self.experiment.config, [len(window.tokens) for window in self.windows]
        return {
            "backbone": config.backbone.name,
            "data": config.data.source,
            "prompt": config.prompt,
            "adapters": config.adapters.model_dump(mode="json"),
            "head": config.head.model_dump(mode="json"),
            "blocks": self.experiment.model.backbone.num_layers,
            "items_in_catalogue": self.experiment.model.model.num_items,
            "clients": len(self.clients),
            "chunks": len(self.experiment.clients.trainer.chunks(self.clients)),
            "items_per_window": config.window.items,
            "tokens_per_window": {
                "min": min(lengths),
                "median": statistics.median(lengths),
                "max": max(lengths),
            },
        }

    def _stacked_chunk(
        self, chunk: Sequence[str], tensors: Mapping[str, Mapping[str, "torch.Tensor"]]
    ) -> list[Step]:
        import torch

        from pfm_llm.model.batches import collate
        from pfm_llm.model.cohort import Parts
        from pfm_llm.protocol.types import PRIVATE_PREFIX

        histories, own = self.experiment.clients.histories, [tensors[client] for client in chunk]
        batch = collate(
            [histories.windows(client) for client in chunk],
            [histories.trunk_states(client) for client in chunk],
        )
        device = batch.trunk.device
        # As local training does: everybody received the same shared tensors, so no copy of them.
        leaves = {
            name: (
                torch.stack([t[name] for t in own]).to(device)
                if name.startswith(PRIVATE_PREFIX)
                else value.to(device).expand(len(chunk), *value.shape).detach()
            ).requires_grad_()
            for name, value in own[0].items()
        }
        losses = self.experiment.model.model.losses(batch, leaves, Parts())
        gradients = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
        return [
            (loss.detach(), {n: g[c] for n, g in zip(leaves, gradients, strict=True)})
            for c, loss in enumerate(losses)
        ]


def choose_clients(experiment: "Run", count: int) -> tuple[str, ...]:
    """A fixed random choice among the clients whose window is full.

    Raises:
        ConfigError: There are not so many.
    """
    import torch

    from pfm_llm.base import seeding
    from pfm_llm.base.errors import ConfigError

    histories, full = experiment.clients.histories, experiment.config.window.items
    order = histories.trainable
    shuffled = torch.randperm(len(order), generator=seeding.generator(_SEED, "benchmark"))
    chosen: list[str] = []
    for index in shuffled.tolist():
        if len(chosen) < count and len(histories.windows(order[index])[0]) == full:
            chosen.append(order[index])
    if len(chosen) < count:
        raise ConfigError(
            f"--clients: {count}, but only {len(chosen)} have a whole window of {full} items"
        )
    return tuple(chosen)


def client_tensors(
    experiment: "Run", adapter: Any, clients: Sequence[str]
) -> tuple[dict[str, "torch.Tensor"], ...]:
    """Shared and private tensors of each client, as after some training: nothing is zero.

    Args:
        experiment: The experiment.
        adapter: A `DualAdapter`: which layers are adapted.
        clients: Client ids. All share the same shared tensors.
    """
    from benchmarks.sequential_peft import stirred
    from pfm_llm.model.parameters import parameter_table
    from pfm_llm.model.private import make_private_part
    from pfm_llm.protocol.parameters import Sizes

    parts, config = experiment.model, experiment.config
    sizes = Sizes(parts.backbone.hidden_size, adapter.modules, parts.model.num_items)
    initial = parameter_table(config, sizes).initial_state()
    shared = stirred(initial.tensors, _SEED, "shared")
    private = make_private_part(config, sizes)
    own = (private.initial(client) for client in clients)
    return tuple(
        shared | stirred(tensors, _SEED, client)
        for client, tensors in zip(clients, own, strict=True)
    )


def race(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the cases in alternation.

    Args:
        cases: What to time; each is called once per repeat.
        repeats: How often.
        clock: Seconds that only grow.

    Returns:
        For each case the seconds of every repeat.
    """
    from pfm_llm.base.progress import Progress

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with Progress(repeats * len(cases), "racing", unit="laps") as progress:
        for _ in range(repeats):
            for name, case in cases.items():
                started = clock()
                case()
                seconds[name].append(clock() - started)
                progress.update(1, last=name)
    return seconds


def rows(seconds: Mapping[str, Sequence[float]], num_clients: int) -> list[dict[str, Any]]:
    """Client steps per second of each case: the slowest repeat, the median, and every one."""
    found = []
    for case, times in seconds.items():
        rates = [num_clients / time for time in times]
        found.append(
            {
                "case": case,
                "unit": UNIT,
                "min": min(rates),
                "median": statistics.median(rates),
                "repeats": len(rates),
                "values": rates,
            }
        )
    return found


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """How many times as fast the first case is as each other, within the same repeat."""
    first, *others = seconds
    found = {}
    for other in others:
        pairs = zip(seconds[other], seconds[first], strict=True)
        values = [slow / fast for slow, fast in pairs]
        found[f"{first}/{other}"] = {"min": min(values), "median": statistics.median(values)}
    return found


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    lines = [f"{'case':<20} {'min':>8} {'median':>8}  {UNIT}"]
    for row in result["rows"]:
        lines.append(f"{row['case']:<20} {row['min']:>8.2f} {row['median']:>8.2f}")
    for name, ratio in result["ratios"].items():
        lines.append(f"{name}: {ratio['median']:.1f} times (at least {ratio['min']:.1f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
