"""Is this the Python, and are these the packages, that the repository is made for?"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from tools.doctor.finding import Finding, fail, ok, some

_LOCK = Path("requirements.txt")
_INSTALL = "make setup && source .venv/bin/activate"
_REINSTALL = "python -m pip install --no-deps -r requirements.txt"
_REBUILD = "exit && make docker-build"  # in the project's container
_IMAGE_MARK = Path("/opt/driftline/rest.txt")  # Dockerfile puts it into the project's image
# What only a torch with CUDA needs: a torch of another index (its version ends in +cpu, say) comes without.
_CUDA_PACKAGES = re.compile(r"(triton|cuda-.*|nvidia-(?!ml-py).*)$")


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """The interpreter's version against `requires-python` of pyproject.toml."""
    shown = ".".join(map(str, version))
    found = re.search(r'^requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', Path("pyproject.toml").read_text(), re.M)
    if found is None:
        return fail("pyproject.toml: requires-python is not of the form '>=3.10,<3.14'", "git checkout pyproject.toml")
    lowest, above = (int(found[1]), int(found[2])), (int(found[3]), int(found[4]))
    if lowest <= version[:2] < above:
        return ok(f"{shown} ({sys.prefix})")
    return fail(
        f"{shown} is too {'old' if version[:2] < lowest else 'new'}: {lowest[0]}.{lowest[1]} to "
        f"{above[0]}.{above[1] - 1} is needed, and everything else needs it",
        "make setup PYTHON=/path/to/python3.11 && source .venv/bin/activate",
    )


def commands() -> Finding:
    """Stages are run as `python -m ...` by dvc: the `python` and `dvc` of PATH have to be this environment's."""
    activate = "source .venv/bin/activate" if Path(".venv/bin/python").exists() else f"export PATH={_bin()}:$PATH"
    program = shutil.which("python")
    if program is None:
        return fail("there is no `python` on PATH, and stages are run by it", activate)
    ask = "import sys; print(sys.prefix)"
    prefix = subprocess.run([program, "-c", ask], capture_output=True, text=True).stdout.strip()  # noqa: S603
    if not prefix or not Path(prefix).samefile(sys.prefix):
        return fail(f"stages are run by the first `python` on PATH, {program}, which is not that of {_bin()}", activate)
    dvc = shutil.which("dvc")
    if dvc is None:
        return fail("there is no `dvc` on PATH", activate)
    if not Path(dvc).parent.samefile(_bin()):
        return fail(f"the first `dvc` on PATH is {dvc}, of another environment than {_bin()}", activate)
    return ok(f"python and dvc of {_bin()}")


def lock() -> Finding:
    """The installed packages against requirements.txt."""
    if not _LOCK.exists():
        return fail(f"{_LOCK} is missing", f"git checkout {_LOCK}")
    in_environment = sys.prefix != sys.base_prefix
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return fail("the packages are not installed here", _install(in_environment))
    torch = _version("torch") or ""
    missing, others, count = [], [], 0
    for line in _requirements():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if "+" in torch and _CUDA_PACKAGES.match(requirement.name):
            continue
        count += 1
        version = _version(requirement.name)
        if version is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(version, prereleases=True):
            others.append(f"{requirement.name} {version} (not {requirement.specifier})")
    wrong = [f"missing: {some(missing)}"] if missing else []
    wrong += [f"another version: {some(others)}"] if others else []
    if wrong:
        return fail(
            f"{len(missing) + len(others)} of {count} packages are not those of {_LOCK}; {'; '.join(wrong)}",
            _install(in_environment or not missing),
        )
    return ok(f"{count} packages as in {_LOCK}")


def gdrive() -> Finding:
    """Whether DVC's Google Drive plugin can be imported, which a plain `pip install dvc-gdrive` breaks."""
    try:
        for name in ("pydrive2.drive", "dvc_gdrive"):
            import_module(name)
    except Exception as error:  # whatever a broken package raises: pyOpenSSL's is an AttributeError
        fix = _install(True)
        if _version("pyOpenSSL"):  # iterative/PyDrive2#361; without it, oauth2client signs by itself
            fix = "python -m pip uninstall --yes pyOpenSSL"
        return fail(f"the Google Drive plugin cannot be imported ({_words(error)})", fix)
    return ok(f"dvc-gdrive {_version('dvc-gdrive')}, PyDrive2 {_version('PyDrive2')}")


def _install(in_place: bool) -> str:
    """What brings the packages of the lock: into the environment that runs this, or into one of this project."""
    if sys.prefix == sys.base_prefix and _IMAGE_MARK.exists():
        return _REBUILD
    return _REINSTALL if in_place else _INSTALL


def _requirements() -> Iterator[str]:
    """The requirements of the lock: lines that begin in the first column (hashes and comments are indented)."""
    for line in _LOCK.read_text(encoding="utf-8").splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            yield line.split(" #")[0].rstrip("\\ ")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _bin() -> Path:
    return Path(sys.executable).parent


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
