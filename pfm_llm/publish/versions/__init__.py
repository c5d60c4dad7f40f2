"""Versions of a published adapter: list them, compare two, check their chain, roll back."""

from pfm_llm.publish.versions.chain import ChainReport, CheckedVersion, verify_chain
from pfm_llm.publish.versions.difference import (
    Change,
    MetricChange,
    SettingChange,
    VersionDiff,
    diff_versions,
)
from pfm_llm.publish.versions.history import Version, find_commit, list_versions
from pfm_llm.publish.versions.restore import copy_artefact, rollback
from pfm_llm.publish.versions.text import (
    chain_text,
    chain_tree,
    diff_text,
    diff_tree,
    versions_text,
    versions_tree,
)

__all__ = [
    "ChainReport",
    "Change",
    "CheckedVersion",
    "MetricChange",
    "SettingChange",
    "Version",
    "VersionDiff",
    "chain_text",
    "chain_tree",
    "copy_artefact",
    "diff_text",
    "diff_tree",
    "diff_versions",
    "find_commit",
    "list_versions",
    "rollback",
    "verify_chain",
    "versions_text",
    "versions_tree",
]
