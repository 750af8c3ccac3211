"""Where the repository is, what its files are called as modules, and which pages it has."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


def module_of(file: str) -> str:
    """The name of a file for ``python -m``, run from `ROOT`."""
    return ".".join(Path(file).relative_to(ROOT).with_suffix("").parts)


def pages() -> list[Path]:
    """Every Markdown file, tracked or not, but for those in hidden folders and in folders that git ignores."""
    # an sdist holds no .gitignore
    listed = ROOT / ".gitignore"
    lines = listed.read_text().split() if listed.exists() else ["build/", "dist/", "*.egg-info/"]
    ignored = [".*", *(line.strip("/") for line in lines)]
    return sorted(_pages(ROOT, ignored))


def _pages(folder: Path, ignored: list[str]) -> Iterator[Path]:
    for path in folder.iterdir():
        # cotolora/kernels is a link to kernels
        if path.is_symlink() or any(fnmatch(path.name, pattern) for pattern in ignored):
            continue
        if path.is_dir():
            yield from _pages(path, ignored)
        elif path.suffix == ".md":
            yield path
