"""The Hub: publishing a folder, and getting it back. Only this package uses its client."""

from huggingface_hub import GitCommitInfo

from pfm_llm.publish.hub.calls import check_login, check_repo_id
from pfm_llm.publish.hub.reading import (
    head_manifest,
    list_commits,
    list_tags,
    pull,
    pull_named,
    read_file,
)
from pfm_llm.publish.hub.sending import Pushed, push_folder

__all__ = [
    "GitCommitInfo",
    "Pushed",
    "check_login",
    "check_repo_id",
    "head_manifest",
    "list_commits",
    "list_tags",
    "pull",
    "pull_named",
    "push_folder",
    "read_file",
]
