"""The configs that come with the package, by name."""

from pathlib import Path

from pfm_llm.base.errors import ConfigError

_SUFFIX = ".yaml"


def find_config(name_or_path: str | Path) -> Path:
    """The file of a config or suite.

    Args:
        name_or_path: The name of a shipped one, such as ``quickstart`` or ``suites/games``, or
            the path of a YAML file (ending in ``.yaml`` or ``.yml``). An existing file of that
            path has precedence.

    Raises:
        ConfigError: No config of that name is shipped; the message lists those that are.
    """
    path = Path(name_or_path)
    if path.is_file() or path.suffix in (_SUFFIX, ".yml"):
        return path
    folder = shipped_folder()
    shipped = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.rglob(f"*{_SUFFIX}"))
    }
    if str(name_or_path) not in shipped:
        raise ConfigError(
            f"there is no config {str(name_or_path)!r}; shipped are {', '.join(shipped)}; "
            "or give the path of a .yaml file"
        )
    return shipped[str(name_or_path)]


def shipped_folder() -> Path:
    """The folder of the shipped configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "_configs"
    return packaged if packaged.is_dir() else package.parent / "configs"
