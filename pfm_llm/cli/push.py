"""``pfm push`` and ``pfm export``: an adapter on its way to the Hub, or to other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pfm_llm.base.errors import ConfigError
from pfm_llm.cli import options

if TYPE_CHECKING:
    from pfm_llm.publish.publishing import PublishRequest


def push(
    repo: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository to push to.")],
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private (the default).")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag of this version, such as v1.")] = None,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch to push to.")] = "main",
    signing_key: options.SigningKey = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the files, send nothing.")
    ] = False,
) -> None:
    """Push a run's shared adapter to the Hugging Face Hub.

    Nothing is sent before all files have been searched for anything private.
    """
    if private and public:
        raise ConfigError("--private and --public exclude each other")

    from pfm_llm.publish.publishing import publish
    from pfm_llm.runs.publication import request_of

    request = request_of(
        options.run_folder(run, runs),
        repo,
        private=not public,
        tag=tag,
        revision=revision,
        signing_key=signing_key,
    )
    if dry_run:
        _show_plan(request)
        return
    pushed = publish(request)
    print(f"{'pushed' if pushed.changed else 'nothing new'}: {pushed.url}")


def _show_plan(request: "PublishRequest") -> None:
    from pfm_llm.base.terminal import harmless
    from pfm_llm.publish.publishing import plan

    planned = plan(request)
    width = max(len(file.name) for file in planned)
    for file in planned:
        print(f"{harmless(file.name):{width}}  {file.size:>11,}  {file.sha256}")
    print(f"{f'{len(planned)} files':{width}}  {sum(file.size for file in planned):>11,}  bytes")
    tag = f", tag {request.tag}" if request.tag else ""
    kind = "private" if request.private else "public"
    exported = harmless(str(request.exported))
    print(
        f"\nfrom {exported} to {request.repo}, branch {request.revision}{tag}; {kind} if "
        "the repository is new.\nNothing was sent. A push also enters the version before it, if "
        "there is one, in the manifest."
    )


_Shared = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Instead of --run: a shared adapter's folder.")
]
_Private = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A private LoRA, from pfm recommend --export-private."),
]
_Cat = Annotated[
    bool, typer.Option("--cat", help="Shared and private as one LoRA, of the sum of ranks.")
]
_Format = Annotated[
    Literal["gguf", "peft"],
    typer.Option("--format", help="Files for llama.cpp; or, with --cat, a folder for PEFT."),
]
_Base = Annotated[
    Path | None,
    typer.Option(
        metavar="GGUF",
        help="The base model's file; default: that of the embedded model, which pip fetches.",
    ),
]


def export(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")],
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    adapter: _Shared = None,
    private: _Private = None,
    cat: _Cat = False,
    kind: _Format = "gguf",
    base: _Base = None,
) -> None:
    """Write LoRAs for programs that know nothing of pfm_llm: llama.cpp, or a server of PEFT's.

    Files with a private part are for their owner alone, and no command publishes them.
    """
    if cat and private is None:
        raise ConfigError("--cat joins the shared adapter and a private LoRA; give --private")
    if kind == "peft" and not cat:
        raise ConfigError("these folders have PEFT's format already; --cat makes one of both")

    from pfm_llm.publish.device.export import export_cat, export_gguf
    from pfm_llm.runs.folders import RunFolders

    if adapter is None:
        folders = RunFolders.of(options.run_folder(run, runs))
        if out.resolve().is_relative_to(folders.public.resolve()):
            raise ConfigError(f"{out} is in {folders.public}, which may be shared; choose another")
        adapter = folders.shared_adapter
    if kind == "peft" and private is not None:
        written = export_cat(adapter, private, out)
    else:
        written = export_gguf(adapter, private, out, base, cat)
    for path in written:
        print(path)
