"""One thin script a stage; none runs with another checkout's package, whose code DVC does not watch."""

import sys
from pathlib import Path

from molf.errors import UserError, main


def require_own_package(folder: Path, imported: Path) -> None:
    """Refuses a package that is not that of the project in which a stage runs; a project without one may use any.

    An editable install puts the checkout that it was made in on the path, in every other clone and worktree as well.

    Args:
        folder: Where the stage runs: the project's root, or below it.
        imported: Folder of the package that was imported.

    Raises:
        UserError: The project has a package of its own, and another was imported.
    """
    folder, imported = folder.resolve(), imported.resolve()
    root = next((parent for parent in (folder, *folder.parents) if (parent / ".dvc").is_dir()), None)
    if root is None or not (root / "src/molf/__init__.py").is_file() or (root / "src/molf").resolve() == imported:
        return
    raise UserError(
        f"molf was imported from {imported}, but this project has its own in {root / 'src/molf'}, which is what DVC "
        f"watches: set PYTHONPATH={root / 'src'}, or install this checkout (`make` in it)"
    )


if sys.argv[:1] == ["-m"]:  # what `python -m molf.stages.STAGE` has there until that module is found
    _code = main(lambda: require_own_package(Path.cwd(), Path(__file__).parents[1]))
    if _code:
        raise SystemExit(_code)
