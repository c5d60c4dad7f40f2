"""``pfm versions``: the versions of a published adapter, and signing keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pfm_llm.cli import options

HELP = "List, compare, verify and restore versions of a published adapter; make a signing key."

_Repo = Annotated[str, typer.Argument(metavar="USER/NAME", show_default=False)]
_Place = Annotated[
    str, typer.Argument(help="user/name, user/name@revision or a folder.", show_default=False)
]
_Revision = Annotated[str, typer.Option(help="Branch, tag or commit.")]


def show_versions(
    repo: _Repo, revision: _Revision = "main", as_json: options.AsJson = False
) -> None:
    """List the versions of a repository, newest first."""
    from pfm_llm.publish.versions.history import list_versions
    from pfm_llm.publish.versions.text import versions_text, versions_tree

    versions = list_versions(repo, revision)
    print(json.dumps(versions_tree(versions)) if as_json else versions_text(versions))


def diff(older: _Place, newer: _Place, as_json: options.AsJson = False) -> None:
    """Show the differences between two versions."""
    from pfm_llm.publish.hub import pull_named
    from pfm_llm.publish.versions.difference import diff_versions
    from pfm_llm.publish.versions.text import diff_text, diff_tree

    found = diff_versions(pull_named(older), pull_named(newer))
    print(json.dumps(diff_tree(found)) if as_json else diff_text(found))


def verify(
    repo: _Repo,
    revision: _Revision = "main",
    trusted_key: Annotated[
        str | None, typer.Option(help="Public key; every version must be signed with it.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check the files, the signature and the parent of each version."""
    from pfm_llm.publish.versions.chain import verify_chain
    from pfm_llm.publish.versions.text import chain_text, chain_tree

    report = verify_chain(repo, revision, trusted_key)
    print(json.dumps(chain_tree(report)) if as_json else chain_text(report))
    if not report.is_whole:
        raise typer.Exit(1)


def roll_back(
    repo: _Repo,
    to: Annotated[str, typer.Option(help="Commit, the unique start of one, or a tag.")],
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch to push to.")] = "main",
    signing_key: options.SigningKey = None,
) -> None:
    """Publish an older version again."""
    from pfm_llm.publish.signing import load_key, public_key
    from pfm_llm.publish.versions.restore import rollback

    key = load_key(signing_key) if signing_key else None
    pushed = rollback(repo, to, signing_key=key, revision=revision)
    if not pushed.changed:
        print(f"{repo} holds that version already: {pushed.url}")
        return
    signed = f"signed by {public_key(key)}" if key else "not signed"
    print(f"rolled back to {to} with commit {pushed.revision[:12]}, {signed}")
    print(pushed.url)


def keygen(
    path: Annotated[
        Path, typer.Argument(help="File to write; never an existing one.", show_default=False)
    ],
) -> None:
    """Make a private key for signing."""
    from pfm_llm.publish.signing import new_key

    public = new_key(path)
    print(f"private key: {path} (keep it to yourself, and a copy in a safe place)")
    print(f"public key: {public} (give it to those who verify your versions)")


def pull(
    repo: _Repo,
    revision: _Revision = "main",
    to: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to copy it to; default: only the cache."),
    ] = None,
) -> None:
    """Fetch a version and check its files."""
    from pfm_llm.base.terminal import harmless
    from pfm_llm.publish import hub
    from pfm_llm.publish.versions.restore import copy_artefact

    artefact = hub.pull(repo, revision)
    if to is not None:
        artefact = copy_artefact(artefact, to)
    name = harmless(artefact.manifest.name)
    print(f"{harmless(artefact.origin)}: {name}, round {artefact.manifest.round}")
    print(f"manifest {artefact.manifest_sha256}, all files as it lists them")
    print(artefact.folder)


COMMANDS: dict[str, Callable[..., None]] = {
    "list": show_versions,
    "diff": diff,
    "verify": verify,
    "rollback": roll_back,
    "keygen": keygen,
    "pull": pull,
}
