"""Push a run's shared adapter to the Hugging Face Hub, after a search for anything private."""

import argparse
from typing import TYPE_CHECKING

from _cli import run_safely

if TYPE_CHECKING:
    from pfm_llm.publish.publishing import PublishRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default=None, help="run folder (default: the newest in runs/)")
    parser.add_argument("--runs", default="runs", help="where to look for the newest run")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="where to")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private",
        action="store_true",
        default=True,
        help="make the repository private when it is created (default)",
    )
    visibility.add_argument(
        "--public",
        action="store_false",
        dest="private",
        help="make it public when it is created",
    )
    parser.add_argument("--tag", default=None, help="tag for this version, such as v1")
    parser.add_argument("--revision", default="main", help="branch (default: main)")
    parser.add_argument("--signing-key", default=None, metavar="PEM", help="sign the manifest")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list the files, send nothing"
    )
    run_safely(push, parser.parse_args())


def push(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.publish.publishing import publish
    from pfm_llm.runs.folders import newest_run
    from pfm_llm.runs.publication import request_of

    request = request_of(
        Path(arguments.run) if arguments.run else newest_run(arguments.runs),
        arguments.repo,
        private=arguments.private,
        tag=arguments.tag,
        revision=arguments.revision,
        signing_key=Path(arguments.signing_key) if arguments.signing_key else None,
    )
    if arguments.dry_run:
        show_plan(request)
        return
    pushed = publish(request).pushed
    print(f"{'pushed' if pushed.changed else 'nothing new'}: {pushed.url}")


def show_plan(request: "PublishRequest") -> None:
    from pfm_llm.publish.publishing import plan

    planned = plan(request)
    width = max(len(file.name) for file in planned)
    for file in planned:
        print(f"{file.name:{width}}  {file.size:>11,}  {file.sha256}")
    print(f"{f'{len(planned)} files':{width}}  {sum(file.size for file in planned):>11,}  bytes")
    tag = f", tag {request.tag}" if request.tag else ""
    kind = "private" if request.private else "public"
    print(
        f"\nfrom {request.exported} to {request.repo}, branch {request.revision}{tag}; {kind} if "
        "the repository is new.\nNothing was sent. A push also enters the version before it, if "
        "there is one, in the manifest."
    )


if __name__ == "__main__":
    main()
