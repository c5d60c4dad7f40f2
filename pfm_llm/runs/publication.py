"""Publishing the exported adapter of a run: during training, at its end, or later."""

import logging
import shutil
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import HubError
from pfm_llm.config.earlier import load_saved
from pfm_llm.config.settings import with_setting
from pfm_llm.federation.privacy import spent_of
from pfm_llm.protocol.types import SharedState
from pfm_llm.publish.card import shown_name
from pfm_llm.publish.export import Exported, export_shared_adapter
from pfm_llm.publish.manifest import Parent
from pfm_llm.publish.publishing import PublishRequest, publish
from pfm_llm.runs.folders import CONFIG_FILE, RunFolders, find_run
from pfm_llm.runs.run import Run, Trained

_log = logging.getLogger(__name__)


def request_of(
    run: Path, repo: str, exported: Path | None = None, **options: Any
) -> PublishRequest:
    """The request to publish a run's shared adapter.

    Args:
        run: The run's folder, or a link to it.
        repo: ``user/name``.
        exported: Another exported folder of the run; None: its ``shared_adapter``.
        options: The other fields of `PublishRequest`.

    Raises:
        ConfigError: There is no run.
    """
    # The private folder lies beside the run itself, not beside a link to it.
    folders = RunFolders.of(find_run(run, run.parent).resolve())
    private_root: Path | None = folders.private
    if not folders.private.is_dir():
        config = load_saved(folders.public / CONFIG_FILE)
        private_root = folders.private if config.adapters.private.enabled else None
    return PublishRequest(exported or folders.shared_adapter, private_root, repo, **options)


def exported_of(run: Run, trained: Trained) -> Exported:
    """The input of `export_shared_adapter` for a run; its config records the private weight."""
    config, started = run.config, run.config.init_from
    parents: tuple[Parent, ...] = ()
    if run.artefact is not None and started is not None:
        origin = Parent(
            relation="trained_from",
            manifest_sha256=run.artefact.manifest_sha256,
            repo=shown_name(started.adapter),
            revision=started.revision,
        )
        parents = (origin,)
    recorded = with_setting(config, "adapters.private.weight", trained.private_weight)
    is_private = config.federation.privacy is not None
    spent = spent_of(run.new_server(), run.checkpoints) if is_private else None
    return Exported(recorded, run.model, run.data.interactions.catalogue, parents, spent)


def push_when_due(run: Run, shared: SharedState) -> None:
    """Publish a committed round. If the Hub fails, the run goes on without this push."""
    wanted, round_number = run.config.push_to_hub, shared.round_number
    is_last = round_number == run.config.federation.num_rounds
    if wanted is None or not wanted.every or round_number % wanted.every or is_last:
        return
    with run.processes.together():
        if not run.processes.is_main:
            return
        exported = run.folders.private / "pushed"
        export_shared_adapter(exported_of(run, run.as_set(shared)), exported, shared)
        folder = run.folders.public
        try:
            pushed = publish(request_of(folder, wanted.repo, exported, private=wanted.private))
            _log.info("round %d is at %s", round_number, pushed.url)
        except HubError as error:
            _log.warning("round %d was not pushed, training goes on: %s", round_number, error)
        finally:
            shutil.rmtree(exported, ignore_errors=True)


def push_finished(run: Run) -> None:
    """Publish the finished run, if its config asks for it.

    Raises:
        HubError: The push failed; the message says how to push later.
    """
    wanted = run.config.push_to_hub
    if wanted is None:
        return
    with run.processes.together():
        if not run.processes.is_main:
            return
        folder = run.folders.public
        request = request_of(folder, wanted.repo, private=wanted.private, tag=wanted.tag)
        try:
            pushed = publish(request)
        except HubError as error:
            raise HubError(
                f"{error}\nThe run is complete; push it later with pfm push "
                f"--run {folder} --repo {wanted.repo}"
            ) from error
        _log.info("the shared adapter is at %s", pushed.url)
