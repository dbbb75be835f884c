"""Files are lost and damaged in every place; verify says what and where, and --repair brings the same bytes back."""

from __future__ import annotations

import json
import os
import random
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from dvc.cli import main as dvc_main
from ruamel.yaml import YAML

from stages.core.errors import InputError
from tests.helpers import commit_all, files, run, set_params
from tools.verify import command as verify

FOLDER, FILE, METRIC = "data/numbers", "models/total.txt", "metrics/count.json"
ZERO, ONE, TWO = (f"{FOLDER}/{name}" for name in ("0.txt", "deep/1.txt", "deep/2.txt"))
SET_ASIDE = Path(".dvc/tmp/set-aside")

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # dvc's use of pygtrie


class Said:
    """What the last call of verify told."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.out = self.err = ""

    def __call__(self, repair: bool = False) -> int:
        self.capfd.readouterr()
        status = verify.main(Namespace(repair=repair, json=False))
        self.out, self.err = self.capfd.readouterr()
        return status

    def line(self, path: str) -> str:
        return next(line for line in self.out.splitlines() if path in line)


@pytest.fixture
def check(small: Path, capfd: pytest.CaptureFixture[str]) -> Said:
    return Said(capfd)


@pytest.fixture
def whole(small: Path) -> dict[str, bytes]:
    """Every output and every file of the cache, as they should be."""
    return everything(small)


def everything(folder: Path) -> dict[str, bytes]:
    found = files(folder / "data", folder / "models", folder / "metrics")
    cache = folder / ".dvc/cache/files/md5"
    return found | {f"cache/{name}": content for name, content in files(cache).items()}


def dvc(*words: str) -> None:
    assert dvc_main([*words, "--quiet"]) == 0


def in_cache(path: str) -> Path:
    """Where the cache has a file, or the list of a folder's files."""
    cache = Path(".dvc/cache/files/md5")
    documents = [YAML(typ="safe").load(file) for file in (Path("dvc.lock"), *Path().glob("?*.dvc"))]
    stages = [stage for document in documents for stage in document.get("stages", {"": document}).values()]
    outs = [out for stage in stages for out in stage["outs"]]
    out = next(out for out in outs if path == out["path"] or path.startswith(f"{out['path']}/"))
    digest: str = out["md5"]
    if path != out["path"]:
        listing = json.loads((cache / digest[:2] / digest[2:]).read_text())
        digest = next(entry["md5"] for entry in listing if path == f"{out['path']}/{entry['relpath']}")
    return cache / digest[:2] / digest[2:]


def damage(path: Path) -> None:
    """Change a byte as a failing disk does: size, times and mode stay, and so does what dvc remembers of the file."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    path.chmod(status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def add_remote(folder: Path) -> Path:
    remote = folder.parent / "storage"
    dvc("remote", "add", "--local", "--default", "storage", str(remote))
    dvc("push")
    return remote


def kept() -> dict[str, bytes]:
    """What was set aside, by its path in the repository."""
    return {name.split("/", 1)[1]: content for name, content in files(SET_ASIDE).items()}


# --- what is found ------------------------------------------------------------------------------------------------


def test_what_is_whole_is_said_to_be(check: Said, capfd: pytest.CaptureFixture[str]) -> None:
    assert check() == 0
    assert check.line(FOLDER) == f"ok    {FOLDER:<18}  3 files, 0.0 MB, intact in workspace and cache"
    assert check.line(FILE).startswith(f"ok    {FILE:<18}  0.0 MB, intact")
    assert "ok    1 small outputs that git keeps are intact" in check.out
    assert check.out.splitlines()[-1] == "verify: 3 outputs of 0.0 MB, all intact"
    assert verify.main(Namespace(repair=False, json=True)) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [(entry["output"], entry["kept_by"], entry["files"]) for entry in listed] == [
        (FOLDER, "dvc", 3),
        (METRIC, "git", 1),
        (FILE, "dvc", 1),
    ]
    assert check(repair=True) == 0
    assert check.err == ""


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (ONE, "altered in the workspace: deep/1.txt"),
        (FILE, "altered in the workspace"),
        (METRIC, "altered in the workspace"),
    ],
)
def test_a_byte_that_flips_unnoticed_in_the_workspace(
    check: Said, small: Path, whole: dict[str, bytes], path: str, says: str
) -> None:
    dvc("status")  # it remembers the hashes now
    damage(small / path)
    dvc("status")  # with --quiet, its exit status would tell
    assert check() == 1
    assert check.line(path if path != ONE else FOLDER).endswith(says)
    assert "1 of them are not as dvc.lock says: python -m tools.verify --repair" in check.out
    content = (small / path).read_bytes()
    assert check(repair=True) == 0
    assert kept() == {path: content}
    assert f"{path}: the altered file is kept as {SET_ASIDE}/" in check.err
    assert everything(small) == whole


def test_a_byte_that_flips_in_the_cache_is_checked_out_by_dvc_without_a_word(
    check: Said, small: Path, whole: dict[str, bytes]
) -> None:
    add_remote(small)
    damage(in_cache(ONE))
    shutil.rmtree(small / FOLDER)
    dvc("checkout")
    assert (small / ONE).read_bytes() != whole["numbers/deep/1.txt"]  # that is what this tool is for
    assert check() == 1
    assert check.line(FOLDER).endswith("altered in the workspace: deep/1.txt; damaged in the cache: deep/1.txt")
    assert check(repair=True) == 0
    assert f"{FOLDER}: 1 files fetched into the cache, from the remote storage" in check.err
    assert everything(small) == whole


@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize(("path", "name"), [(ONE, ": deep/1.txt"), (FILE, ""), (FOLDER, ": the list of its files")])
def test_the_workspace_mends_the_cache(
    check: Said, small: Path, whole: dict[str, bytes], path: str, name: str, how: str
) -> None:
    if how == "damaged":
        damage(in_cache(path))
    else:
        in_cache(path).unlink()
    assert check() == 1
    assert check.line(path if path != ONE else FOLDER).endswith(f"{how} in the cache{name}")
    assert check(repair=True) == 0
    assert "from the workspace" in check.err
    assert kept() == {}
    assert everything(small) == whole


def test_the_cache_mends_the_workspace(check: Said, small: Path, whole: dict[str, bytes]) -> None:
    (small / ZERO).unlink()
    (small / ONE).write_text("by hand\n")
    (small / FOLDER / "mine.txt").write_text("mine\n")
    (small / METRIC).write_text("{}\n")
    (small / FILE).unlink()
    assert check() == 1
    assert check.line(FOLDER).endswith(
        "missing in the workspace: 0.txt; altered in the workspace: deep/1.txt; "
        "not in dvc.lock, but in the workspace: mine.txt"
    )
    assert check.line(FILE).endswith("missing in the workspace")
    assert check(repair=True) == 0
    assert kept() == {ONE: b"by hand\n", f"{FOLDER}/mine.txt": b"mine\n", METRIC: b"{}\n"}
    assert f"{FOLDER}/mine.txt: the extra file is kept as" in check.err
    assert f"{METRIC}: taken from git" in check.err
    assert everything(small) == whole
    shutil.rmtree(small / FOLDER)
    assert check() == 1
    assert check.line(FOLDER).endswith("all of it is missing in the workspace")


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_a_link_carries_the_damage_into_the_cache(check: Said, small: Path, whole: dict[str, bytes], link: str) -> None:
    dvc("config", "--local", "cache.type", link)
    dvc("checkout", "--relink")
    add_remote(small)
    damage(small / ONE)
    assert check() == 1
    assert check.line(FOLDER).endswith("altered in the workspace: deep/1.txt; damaged in the cache: deep/1.txt")
    content = (small / ONE).read_bytes()
    assert check(repair=True) == 0
    assert kept() == {ONE: content}
    assert everything(small) == whole
    assert (small / ONE).is_symlink() == (link == "symlink")
    assert (small / ONE).samefile(in_cache(ONE))


# --- the remote and the stage -------------------------------------------------------------------------------------


def test_a_lost_list_of_files_comes_from_the_remote(check: Said, small: Path, whole: dict[str, bytes]) -> None:
    """Without it nobody knows what is in the folder, and so a second round is needed for its files."""
    add_remote(small)
    in_cache(TWO).unlink()
    damage(in_cache(FOLDER))
    (small / TWO).write_text("by hand\n")
    assert check() == 1
    says = (
        "altered, and no list of its files to say which, in the workspace; damaged in the cache: the list of its files"
    )
    assert check.line(FOLDER).endswith(says)
    assert check(repair=True) == 0
    assert kept()[TWO] == b"by hand\n"
    assert everything(small) == whole


def test_without_a_remote_the_stage_runs_again(check: Said, small: Path, whole: dict[str, bytes]) -> None:
    lock = (small / "dvc.lock").read_bytes()
    shutil.rmtree(small / ".dvc/cache")
    (small / ONE).write_text("by hand\n")
    (small / METRIC).write_text("{}\n")
    assert check(repair=True) == 0
    assert "repair: no copy is left: make runs again" in check.err
    assert "total runs again" not in check.err  # its output is intact in the workspace
    assert kept() == {name: content for name, content in kept().items() if name.startswith(("data/", "metrics/"))}
    assert (kept()[ONE], kept()[METRIC]) == (b"by hand\n", b"{}\n")
    assert everything(small) == whole | {name: data for name, data in everything(small).items() if "/runs/" in name}
    assert (small / "dvc.lock").read_bytes() == lock
    assert run(small, "dvc", "status", "--json").stdout.strip() == "{}"


def test_a_remote_that_is_damaged_too(check: Said, small: Path, whole: dict[str, bytes]) -> None:
    remote = add_remote(small)
    cached = in_cache(FILE)
    damage(remote / "files/md5" / cached.parent.name / cached.name)
    cached.unlink()
    (small / FILE).unlink()
    assert check(repair=True) == 0
    assert "the remote storage has" in check.err
    assert "damaged, too" in check.err
    assert "total runs again" in check.err
    assert everything(small) == whole


def test_a_remote_that_does_not_answer_reruns_nothing(check: Said, small: Path) -> None:
    remote = add_remote(small)
    in_cache(FILE).unlink()
    (small / FILE).unlink()
    remote.rename(small.parent / "unmounted")
    with pytest.raises(InputError, match=r"models/total\.txt: the remote storage does not give it .there is no folder"):
        check(repair=True)
    assert not (small / FILE).exists()
    dvc("remote", "modify", "--local", "storage", "url", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match="cannot be reached: .*dvc repro --force --single-item total"):
        check(repair=True)
    assert not (small / FILE).exists()


def test_a_remote_is_not_asked_for_what_is_never_pushed(check: Said, small: Path, whole: dict[str, bytes]) -> None:
    pipeline = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(pipeline.replace(f"[{FILE}]", f"[{{{FILE}: {{push: false}}}}]"))
    assert Path("dvc.yaml").read_text() != pipeline
    dvc("remote", "add", "--local", "--default", "storage", "http://127.0.0.1:9/")
    in_cache(FILE).unlink()
    (small / FILE).unlink()
    assert check(repair=True) == 0
    assert "total runs again" in check.err
    assert everything(small) == whole


def test_a_stage_that_would_make_something_else_does_not_run(check: Said, small: Path) -> None:
    set_params(small / "params.yaml", {"make.count": 4})
    lock = (small / "dvc.lock").read_bytes()
    in_cache(ONE).unlink()
    (small / ONE).write_text("by hand\n")
    in_cache(FILE).unlink()
    (small / FILE).unlink()
    assert check(repair=True) == 1
    assert f"{FOLDER} cannot be mended: make would make something else, because its code, params or" in check.err
    assert f"{FILE} cannot be mended: total would read {FOLDER}" in check.err
    assert (small / ONE).read_text() == "by hand\n"  # it stays as it was
    assert kept() == {ONE: b"by hand\n"}
    assert (small / "dvc.lock").read_bytes() == lock
    run(small, "git", "checkout", "-q", "params.yaml")
    assert check(repair=True) == 0


def test_a_stage_that_fails_or_makes_other_bytes(check: Said, small: Path) -> None:
    (small / "total.py").write_text("import os, pathlib\npathlib.Path('models/total.txt').write_bytes(os.urandom(8))\n")
    run(small, "dvc", "repro", "-q")
    commit_all(small)
    in_cache(FILE).unlink()
    (small / FILE).unlink()
    assert check(repair=True) == 0  # dvc.lock has the new bytes, and git diff shows them
    assert f"{FILE}: other bytes than before (another kind of machine?)" in check.err
    assert run(small, "git", "status", "--porcelain").stdout.split() == ["M", "dvc.lock"]
    (small / "total.py").write_text("raise SystemExit(3)\n")
    run(small, "dvc", "commit", "-f", "-q", "total")
    in_cache(FILE).unlink()
    (small / FILE).unlink()
    assert check(repair=True) == 1
    assert f"{FILE} cannot be mended: total failed; see above" in check.err


def test_data_that_no_stage_makes(check: Said, small: Path) -> None:
    (small / "pets.bin").write_bytes(b"pets")
    dvc("add", "pets.bin")
    in_cache("pets.bin").unlink()
    assert check(repair=True) == 0
    in_cache("pets.bin").unlink()
    (small / "pets.bin").write_bytes(b"cats")
    assert check(repair=True) == 1
    assert "pets.bin cannot be mended: nothing makes them again; `dvc pull pets.bin.dvc`" in check.err
    assert (small / "pets.bin").read_bytes() == b"cats"


def test_two_outputs_with_the_same_file(check: Said, small: Path) -> None:
    shutil.copy2(small / FILE, small / "same.txt")
    dvc("add", "same.txt")
    damage(in_cache("same.txt"))
    assert check() == 1
    assert (check.line(FILE)[:4], check.line("same.txt")[:4]) == ("FAIL", "FAIL")
    assert check(repair=True) == 0


CASES = [
    pytest.param(seed, remote, marks=[pytest.mark.slow] if seed >= few else [], id=f"{name}-{seed}")
    for name, remote, few in (("remote", True, 4), ("alone", False, 2))
    for seed in range(60)
]


@pytest.mark.parametrize(("seed", "remote"), CASES)
def test_whatever_is_lost_comes_back_and_nothing_of_the_users_goes(
    check: Said, small: Path, whole: dict[str, bytes], seed: int, remote: bool
) -> None:
    """Faults anywhere, several at a time; with a remote that has everything, and without one."""
    if remote:
        add_remote(small)
    rng = random.Random(seed)
    by_hand = {}
    objects = {path: in_cache(path) for path in (FOLDER, ZERO, ONE, TWO, FILE)}
    for path in rng.sample(list(objects), rng.randint(1, 5)):
        rng.choice([damage, Path.unlink])(objects[path])  # type: ignore[operator]
    for path in rng.sample([ZERO, ONE, TWO, FILE, METRIC, f"{FOLDER}/mine"], rng.randint(1, 6)):
        if rng.random() < 0.4 and (small / path).exists():
            (small / path).unlink()
        else:
            by_hand[path] = rng.randbytes(10)
            (small / path).write_bytes(by_hand[path])
    assert check() == 1
    assert check(repair=True) == 0, check.out + check.err
    assert everything(small) == whole
    assert ("runs again" not in check.err) or not remote
    assert by_hand.items() <= kept().items()


# --- the command --------------------------------------------------------------------------------------------------


def test_what_cannot_be_verified(check: Said, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "dvc.yaml").write_text(
        (small / "dvc.yaml").read_text() + "  later:\n    cmd: 'true'\n    outs: [later.txt]\n"
    )
    assert check() == 0
    assert check.line("later.txt").endswith("not made yet (dvc repro later)")
    (small / "dvc.yaml").write_text("stages: 3\n")
    with pytest.raises(InputError, match="dvc cannot read the pipeline"):
        check()
    (small / "dvc.lock").unlink()
    with pytest.raises(InputError, match=r"there is no dvc\.lock: nothing has run"):
        check()
    monkeypatch.chdir(small.parent)
    with pytest.raises(InputError, match=r"no dvc\.yaml here; run this from the root"):
        check()


@pytest.mark.slow
def test_a_lost_model_is_trained_again_to_the_same_bytes(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command as it is typed, on the real pipeline, after a disk has lost the weights and all of the cache."""
    before = files(repository / "data", repository / "models")
    shutil.rmtree(repository / ".dvc/cache")
    damage(repository / "models/classifier/model.safetensors")
    result = run(repository, "python", "-m", "tools.verify", check=False)
    assert result.returncode == 1
    assert "altered, and no list of its files to say which" in result.stdout
    result = run(repository, "python", "-m", "tools.verify", "--repair", "--json")
    assert [entry for entry in json.loads(result.stdout) if entry["problems"]] == []
    assert "no copy is left: train runs again" in result.stderr
    assert "evaluate runs again" not in result.stderr
    assert files(repository / "data", repository / "models") == before
    assert run(repository, "git", "status", "--porcelain").stdout == ""
