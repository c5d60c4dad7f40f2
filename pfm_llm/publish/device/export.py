"""LoRAs for a device, or for a server of somebody else: the files of ``pfm export``."""

from pathlib import Path

from pfm_llm.base import assets, files
from pfm_llm.base.errors import ConfigError
from pfm_llm.model.backbone import HUB_NAMES
from pfm_llm.publish.artefact import ADAPTER_CONFIG_FILE, ADAPTER_FILE, MANIFEST_FILE
from pfm_llm.publish.device.gguf_lora import GgufBase, write_gguf
from pfm_llm.publish.device.lora_folder import FolderLora

SHARED_FILE, PRIVATE_FILE, CAT_FILE = "shared.gguf", "private.gguf", "cat.gguf"
_EMBEDDED = {HUB_NAMES["smollm2-135m"]: assets.smollm2_135m_gguf}
_DESCRIPTIONS = {
    SHARED_FILE: "Shared LoRA",
    PRIVATE_FILE: "Private LoRA of one user, for its owner alone",
    CAT_FILE: "Shared LoRA and the private LoRA of one user, for its owner alone",
}


def export_gguf(
    shared: Path, private: Path | None, out: Path, base: Path | None = None, cat: bool = False
) -> list[Path]:
    """Write LoRAs as GGUF files for llama.cpp.

    Args:
        shared: The PEFT folder of the shared LoRA.
        private: That of a private LoRA, whose file is to be mixed with the shared one; None: the
            shared LoRA alone. With it the folder ``out`` is made 0700.
        out: The folder to write.
        base: The GGUF file of the base model; None: that of the embedded model.
        cat: One LoRA of both instead of two.

    Returns:
        The files.

    Raises:
        ConfigError: ``out`` is in a published folder, or holds other files and is to become
            private; or ``base`` is missing.
        ArtefactError: A folder is no plain LoRA of the base model.
        CorruptFileError: A file is damaged.
        StorageError: A file cannot be written.
    """
    _check_unpublished(out)
    loras = {SHARED_FILE: FolderLora.read(shared)}
    if private is not None:
        loras[PRIVATE_FILE] = FolderLora.read(private)
    if private is not None and cat:
        loras = {CAT_FILE: loras[SHARED_FILE].joined(loras[PRIVATE_FILE])}
    of_base = GgufBase.read(base or _embedded(loras))
    for lora in loras.values():
        dict(of_base.placed(lora))  # before a file is written
    if private is not None:
        files.make_own_dir(out, _DESCRIPTIONS.keys())
    with files.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, lora in loras.items():
        write_gguf(lora, of_base, out / name, _DESCRIPTIONS[name])
    return [out / name for name in loras]


def export_cat(shared: Path, private: Path, out: Path) -> list[Path]:
    """Write one LoRA of two as a PEFT folder, for a server that takes one; see `FolderLora`.

    Args:
        shared: The PEFT folder of the shared LoRA.
        private: That of a private LoRA.
        out: The folder to write, made 0700.

    Returns:
        The files.

    Raises:
        ConfigError: ``out`` is in a published folder, or holds other files than an adapter's.
        ArtefactError: A folder is no plain LoRA, or both have not the same base model.
        CorruptFileError: A file is damaged.
        StorageError: A file cannot be written.
    """
    _check_unpublished(out)
    FolderLora.read(shared).joined(FolderLora.read(private)).write(out)
    return [out / ADAPTER_CONFIG_FILE, out / ADAPTER_FILE]


def _check_unpublished(out: Path) -> None:
    """Check that no folder above is one that is published as a whole."""
    for folder in (out.resolve(), *out.resolve().parents):
        if (folder / MANIFEST_FILE).exists():
            raise ConfigError(
                f"{out} is in {folder}, which is a published adapter's folder; choose another one"
            )


def _embedded(loras: dict[str, FolderLora]) -> Path:
    """The file of the embedded model, where all LoRAs are of it."""
    name = " and ".join(sorted({lora.base_name for lora in loras.values()}))
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    raise ConfigError(
        f"the LoRA belongs to {name}; pass base (--base): the GGUF file of that model which "
        "llama.cpp loads"
    )
