"""Publishing what a run exported."""

from pathlib import Path
from typing import Any

from pfm_llm.config.schema import load_config
from pfm_llm.publish.publishing import PublishRequest
from pfm_llm.runs.folders import CONFIG_FILE, RunFolders


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
    folders = RunFolders.of(run.resolve())
    private_root: Path | None = folders.private
    if not folders.private.is_dir():
        config = load_config(run / CONFIG_FILE)
        private_root = folders.private if config.adapters.private.enabled else None
    return PublishRequest(exported or folders.shared_adapter, private_root, repo, **options)
