"""The clients of a run with other histories than their own."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pfm_llm.client.private_store import PrivateStore
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import TrainData
from pfm_llm.runs.run import Run, make_clients


@contextlib.contextmanager
def with_histories(run: Run, histories: Interactions) -> Iterator[Run]:
    """The run whose clients have these training histories, and no private states of before.

    Args:
        run: The run.
        histories: A history for each user of the run.
    """
    members = tuple(run.clients.histories.clients.values())
    with tempfile.TemporaryDirectory(dir=run.folders.private) as empty:
        # The store is empty, because the stored private states know the users' own histories.
        clients = make_clients(
            run.config,
            run.model,
            members,
            TrainData(histories),
            run.clients.cache,
            PrivateStore(Path(empty)),
        )
        yield dataclasses.replace(run, clients=clients)
