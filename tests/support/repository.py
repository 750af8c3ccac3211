"""Where the repository is, and what its files are called as modules."""

from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


def module_of(file: str) -> str:
    """What ``python -m`` calls the file, which is run from `ROOT`."""
    return ".".join(Path(file).relative_to(ROOT).with_suffix("").parts)
