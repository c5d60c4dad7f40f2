"""Versions of a published adapter: list, compare, verify, roll back, pull; and a signing key."""

import argparse

from _cli import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the versions of a repository, newest first")
    diff = commands.add_parser("diff", help="what changed from one version to another")
    verify = commands.add_parser("verify", help="check files, signatures and what led to what")
    rollback = commands.add_parser("rollback", help="publish an older version anew")
    keygen = commands.add_parser("keygen", help="make a private key to sign with")
    pull = commands.add_parser("pull", help="fetch a version and check its files")

    for command in (listing, verify, rollback, pull):
        command.add_argument("repo", metavar="REPO", help="user/name")
    for command in (listing, verify, pull):
        command.add_argument("--revision", default="main", help="branch, tag or commit")
    for command in (listing, diff, verify):
        command.add_argument("--json", action="store_true", help="print JSON")
    for place in ("older", "newer"):
        diff.add_argument(place, help="user/name, user/name@revision or a folder")
    verify.add_argument("--trusted-key", help="public key that all must be signed with")
    rollback.add_argument("--to", required=True, help="commit, unique start of one, or tag")
    rollback.add_argument("--revision", default="main", help="branch to push to")
    rollback.add_argument("--signing-key", help="file of the private key to sign with")
    keygen.add_argument("path", metavar="PATH", help="file to write; never an existing one")
    pull.add_argument("--to", help="folder to copy it to (default: only the client's cache)")

    listing.set_defaults(run=list_command)
    diff.set_defaults(run=diff_command)
    verify.set_defaults(run=verify_command)
    rollback.set_defaults(run=rollback_command)
    keygen.set_defaults(run=keygen_command)
    pull.set_defaults(run=pull_command)
    arguments = parser.parse_args()
    run_safely(arguments.run, arguments)


def list_command(arguments: argparse.Namespace) -> None:
    import json

    from pfm_llm.publish.versions import list_versions, versions_text, versions_tree

    versions = list_versions(arguments.repo, arguments.revision)
    print(json.dumps(versions_tree(versions)) if arguments.json else versions_text(versions))


def diff_command(arguments: argparse.Namespace) -> None:
    import json

    from pfm_llm.publish.hub import pull_named
    from pfm_llm.publish.versions import diff_text, diff_tree, diff_versions

    diff = diff_versions(pull_named(arguments.older), pull_named(arguments.newer))
    print(json.dumps(diff_tree(diff)) if arguments.json else diff_text(diff))


def verify_command(arguments: argparse.Namespace) -> None:
    import json

    from pfm_llm.publish.versions import chain_text, chain_tree, verify_chain

    report = verify_chain(arguments.repo, arguments.revision, arguments.trusted_key)
    print(json.dumps(chain_tree(report)) if arguments.json else chain_text(report))
    if not report.is_whole:
        raise SystemExit(1)


def rollback_command(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.publish.signing import load_key, public_key
    from pfm_llm.publish.versions import rollback

    key = load_key(Path(arguments.signing_key)) if arguments.signing_key else None
    pushed = rollback(arguments.repo, arguments.to, signing_key=key, revision=arguments.revision)
    if not pushed.changed:
        print(f"{arguments.repo} holds that version already: {pushed.url}")
        return
    signed = f"signed by {public_key(key)}" if key else "not signed"
    print(f"rolled back to {arguments.to} with commit {pushed.revision[:12]}, {signed}")
    print(pushed.url)


def keygen_command(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.publish.signing import new_key

    public = new_key(Path(arguments.path))
    print(f"private key: {arguments.path} (keep it to yourself, and a copy in a safe place)")
    print(f"public key: {public} (tell it to those who are to trust you)")


def pull_command(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.publish.hub import pull
    from pfm_llm.publish.versions import copy_artefact

    artefact = pull(arguments.repo, arguments.revision)
    if arguments.to:
        artefact = copy_artefact(artefact, Path(arguments.to))
    print(f"{artefact.origin}: {artefact.manifest.name}, round {artefact.manifest.round}")
    print(f"manifest {artefact.manifest_sha256}, all files as it lists them")
    print(artefact.folder)


if __name__ == "__main__":
    main()
