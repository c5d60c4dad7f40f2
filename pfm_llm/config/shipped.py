"""The configs that are shipped with the package."""

from pathlib import Path

from pfm_llm.base.errors import ConfigError


def shipped_configs() -> dict[str, Path]:
    """Name to file of each shipped config, by name."""
    package = Path(__file__).parents[1]
    # The build copies the configs into the wheel; a checkout has them beside the package.
    packaged = package / "_configs"
    folder = packaged if packaged.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name_or_path: str | Path) -> Path:
    """The file of a config.

    Args:
        name_or_path: The path of a YAML file, or the name of a shipped config.

    Raises:
        ConfigError: It is neither; the message lists the shipped ones.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    shipped = shipped_configs()
    if str(name_or_path) not in shipped:
        raise ConfigError(
            f"no config {str(name_or_path)!r}: give the path of a YAML file, or one of "
            f"{', '.join(shipped)}"
        )
    return shipped[str(name_or_path)]
