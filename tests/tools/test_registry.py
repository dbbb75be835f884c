"""The registry with the real git, gto and dvc: versions, stages, and the model that a name stands for."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import dvc.api
import pytest

from stages.core.errors import InputError
from tests.helpers import commit_all, files, run, set_params
from tools.registry import command as registry
from tools.registry import revision, versions

PUSH = "          share it: python -m tools.registry push && git push && git push --tags"


@pytest.fixture
def here(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(repository)
    run(repository, "git", "status")  # the copies' times go into the index
    return repository


@pytest.fixture(scope="session")
def two_versions(finished_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two versions of different models, the older one back in prod, and a remote that has both."""
    folder = tmp_path_factory.mktemp("registered") / "repository"
    shutil.copytree(finished_repository, folder, symlinks=True)
    tool(folder, "register")
    tool(folder, "promote", "prod")
    set_params(folder / "params.yaml", {"train.lr": 0.02})
    run(folder, "dvc", "repro", "train")
    commit_all(folder)
    run(folder, "gto", "register", "classifier")  # the tool would ask for the other stages to be run, too
    tool(folder, "promote", "prod")
    tool(folder, "promote", "staging")
    tool(folder, "promote", "prod", "v0.0.1")
    # the remote is younger than the versions
    run(folder, "dvc", "remote", "add", "-q", "-d", "storage", str(folder.parent / "remote"))
    commit_all(folder)
    assert "v0.0.1, v0.0.2 is on the remote storage (" in tool(folder, "push")
    return folder


def tool(folder: Path, *words: str) -> str:
    return run(folder, "python", "-m", "tools.registry", *words).stdout


def commit_of(folder: Path, revision: str) -> str:
    return run(folder, "git", "rev-parse", f"{revision}^{{commit}}").stdout.strip()


def cached_file(folder: Path, name: str) -> Path:
    digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def empty_commit(folder: Path) -> None:
    run(folder, "git", "commit", "-q", "--allow-empty", "-m", "nothing new")


# --- register and promote -----------------------------------------------------------------------------------------


def test_a_commit_becomes_a_version_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = commit_of(here, "HEAD")
    registry.register()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"registry: commit {head[:7]} is v0.0.1 now, top1 0.")
    assert said[1].startswith(PUSH)
    registry.register()
    assert capsys.readouterr().out == f"registry: commit {head[:7]} is v0.0.1 already\n"
    empty_commit(here)
    registry.register()
    assert f"commit {commit_of(here, 'HEAD')[:7]} is v0.0.2 now" in capsys.readouterr().out
    assert run(here, "git", "tag").stdout.split() == ["classifier@v0.0.1", "classifier@v0.0.2"]
    assert run(here, "git", "status", "--porcelain").stdout == ""


def test_what_cannot_be_made_again_is_not_registered(here: Path) -> None:
    set_params(here / "params.yaml", {"evaluate.num_bins": 3})
    with pytest.raises(InputError, match=r"not committed: params\.yaml; commit or stash"):
        registry.register()
    run(here, "git", "commit", "-qam", "not run")
    with pytest.raises(InputError, match=r"not those of the last commit: evaluate is stale; run `dvc repro`"):
        registry.register()
    run(here, "git", "reset", "-q", "--hard", "HEAD~1")
    (here / "metrics/evaluate.json").unlink()
    with pytest.raises(InputError, match=r"not committed: metrics/evaluate\.json"):
        registry.register()
    assert run(here, "git", "tag").stdout == ""


def test_a_model_that_is_not_in_the_cache_is_not_registered(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached_file(here, "models/classifier/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"not in DVC's cache: .*models/classifier/.*`dvc commit` brings it there"):
        registry.register()
    run(here, "dvc", "commit", "-f", "-q", "train")  # as the message says
    registry.register()
    assert "is v0.0.1 now" in capsys.readouterr().out


def test_names_that_do_not_exist_are_refused_with_those_that_do(here: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown stage 'prud' \(did you mean prod\?\); \.gto names dev, staging, prod"
    ):
        registry.promote("prud", None)
    with pytest.raises(InputError, match="no version is registered yet: make register"):
        registry.promote("prod", None)
    registry.register()
    with pytest.raises(
        InputError, match=r"unknown version '0\.0\.1' \(did you mean v0\.0\.1\?\); registered are v0\.0\.1"
    ):
        registry.promote("prod", "0.0.1")
    with pytest.raises(InputError, match=r"is named 'prod'; versions: v0\.0\.1; stages: none \(make promote\)"):
        versions.resolve("prod")
    result = run(here, "python", "-m", "tools.registry", "fetch", "nobody", check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("registry: error: no stage, version, experiment or git revision is named 'nobody'")
    assert len(result.stderr.splitlines()) == 1


def test_a_stage_goes_on_and_back_as_gto_and_dvc_see_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commits = []
    for _ in range(2):
        empty_commit(here)
        commits.append(registry.register_commit(commit := commit_of(here, "HEAD")) and commit)

    def at_work() -> str:
        found = versions.read_registry()
        assert dvc.api.artifacts_show("classifier", stage="prod")["rev"] == found.stages["prod"]
        assert run(here, "gto", "show", "classifier#prod", "--version").stdout.strip() == found.version_of(
            found.stages["prod"]
        )
        return found.stages["prod"]

    registry.promote("prod", None)
    assert at_work() == commits[1]
    registry.promote("prod", "v0.0.1")
    assert at_work() == commits[0]
    registry.promote("prod", "v0.0.2")  # for the second time
    assert at_work() == commits[1] == versions.resolve("prod") == versions.resolve("v0.0.2")
    capsys.readouterr()
    registry.promote("prod", "v0.0.2")
    assert capsys.readouterr().out == "registry: v0.0.2 is in prod already\n"
    registry.show()
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["version", "stages", "commit", "date", "top1", "subject"]
    assert table[1].split()[:3] == ["v0.0.2", "prod", commits[1][:7]]
    assert table[2].split()[:2] == ["v0.0.1", commits[0][:7]]


def test_tags_are_read_as_gto_reads_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out of a stage, withdrawn, without annotation, of another artifact, in the order of their times."""
    commits = [commit_of(here, "HEAD")]
    for _ in range(11):
        empty_commit(here)
        commits.append(commit_of(here, "HEAD"))
    for i, commit in enumerate(commits):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"{1_800_000_000 + i} +0000")
        run(here, "git", "tag", "-a", "-m", "m", f"classifier@v0.0.{i + 1}", commit)
    events = ["prod#1 0", "prod#2 1", "prod!#3 1", "staging#4 2", "staging!#5 2", "dev#10 3", "dev#9 4"]
    for i, event in enumerate(events):
        tag, commit = event.split()
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"{1_800_000_100 + i} +0000")
        run(here, "git", "tag", "-a", "-m", "m", f"classifier#{tag}", commits[int(commit)])
    run(here, "git", "tag", "-a", "-m", "m", "classifier@v0.0.12!", commits[11])
    run(here, "git", "tag", "classifier#prod#20", commits[5])
    run(here, "git", "tag", "-a", "-m", "m", "classifier-2@v0.0.1", commits[0])
    run(here, "git", "tag", "-a", "-m", "m", "drift-detector#prod#1", commits[6])
    for odd in ("v1.0.0rc1", "v1.0.0.x", "v1"):  # no versions to gto, either
        run(here, "git", "tag", "-a", "-m", "m", f"classifier@{odd}", commits[0])
    found = versions.read_registry()
    assert list(found.versions) == [f"v0.0.{i + 1}" for i in range(11)]  # 9 before 10, and 12 is withdrawn
    assert found.stages == {"dev": commits[4], "prod": commits[0]}
    assert found.last_change == 1_800_000_106
    for stage, version in (("dev", "v0.0.5"), ("prod", "v0.0.1"), ("staging", "")):
        said = run(here, "gto", "show", f"classifier#{stage}", "--version").stdout
        assert said.strip() == version
    with pytest.raises(InputError, match=r"is .* in the future; set this machine's clock"):
        registry.promote("prod", "v0.0.5")


def test_versions_are_in_the_order_of_semantic_versioning() -> None:
    right = ["v0.0.9", "v0.0.10", "v1.0.0-1", "v1.0.0-rc.2", "v1.0.0-rc.10", "v1.0.0-rc.x", "v1.0.0", "v1.0.1+b-1"]
    found = right[::-1]
    found.sort(key=versions._order)
    assert found == right


def test_a_version_whose_commit_says_nothing_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(here, "git", "commit", "-q", "--allow-empty", "--allow-empty-message", "-m", "")
    registry.register()
    registry.show()
    assert re.search(r"^v0\.0\.1 +\w{7}  \d{4}-\d\d-\d\d  0\.\d{4}$", capsys.readouterr().out, flags=re.MULTILINE)


# --- the model that a name stands for -----------------------------------------------------------------------------


def test_a_fresh_clone_finds_the_same_bytes(
    two_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version and stage are older than the remote's entry in .dvc/config."""
    run(tmp_path, "git", "clone", "-q", str(two_versions), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    new = files(two_versions / "models/classifier")
    old = {name: run_bytes(two_versions, f"v0.0.1:{name}") for name in new}
    assert old != new
    found = revision.model_folder("prod", "models/classifier")
    assert files(found) == old
    assert found == Path(".dvc/tmp/models") / commit_of(two_versions, "classifier@v0.0.1") / "classifier"
    assert revision.model_folder("v0.0.1", "models/classifier") == found
    assert files(revision.model_folder("staging", "models/classifier")) == new
    assert files(revision.model_folder("HEAD", "models/classifier")) == new
    assert files(revision.model_folder("HEAD", "models//classifier/")) == new
    for path in (".", "models/..", "../x", "/models"):
        with pytest.raises(InputError, match="name a file or folder of the commit"):
            revision.model_folder("HEAD", path)
    assert not Path("models").exists()
    assert run(Path.cwd(), "git", "status", "--porcelain").stdout == ""
    # what anyone has who has dvc, but not these tools
    get = ["dvc", "artifacts", "get", "clone", "classifier", "--stage", "prod", "--remote", "storage", "--out", "got"]
    run(tmp_path, *get)
    assert files(tmp_path / "got") == old


def test_files_that_are_nowhere_are_not_called_pushed(
    two_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(two_versions, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    run(Path.cwd(), "dvc", "remote", "modify", "-q", "storage", "url", str(tmp_path / "empty"))
    weights = cached_file(Path.cwd(), "models/classifier/model.safetensors")
    weights.unlink()
    digest = weights.parent.name + weights.name
    with pytest.raises(
        InputError, match=f"remote storage does not have everything, .* a file of md5 {digest}; push from"
    ):
        registry.push()
    shutil.rmtree(Path(".dvc/cache"))
    shutil.rmtree(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"nor has DVC's cache: .*models/classifier, .*; push from where it was made"):
        registry.push()


def run_bytes(folder: Path, name: str) -> bytes:
    """A file of models/classifier as it was in a version, by dvc itself."""
    version, _, path = name.partition(":")
    content: bytes = dvc.api.read(f"models/classifier/{path}", repo=str(folder), rev=f"classifier@{version}", mode="rb")
    return content


def test_a_model_that_was_fetched_needs_neither_dvc_nor_torch(here: Path) -> None:
    registry.register()
    registry.promote("prod", None)
    say = (
        "import sys\nfrom tools.registry.revision import model_folder\n"
        "print(model_folder('prod', 'models/classifier'))\n"
        "print({'dvc', 'gto', 'torch', 'numpy', 'ruamel'} & {name.split('.')[0] for name in sys.modules})"
    )
    first = tool(here, "fetch", "prod", "--path", "models/classifier").strip()
    made = (here / first).stat().st_mtime_ns
    assert run(here, "python", "-c", say).stdout.splitlines() == [first, "set()"]
    assert (here / first).stat().st_mtime_ns == made
    assert files(here / first) == files(here / "models/classifier")


def test_an_experiment_is_found_by_its_name(here: Path) -> None:
    run(here, "dvc", "exp", "save", "-f", "-n", "mine")
    commit = run(here, "git", "for-each-ref", "--format=%(objectname)", "refs/exps/**/mine").stdout.strip()
    assert versions.resolve("mine") == commit
    assert files(revision.model_folder("mine", "models/classifier")) == files(here / "models/classifier")
    empty_commit(here)
    run(here, "git", "update-ref", f"refs/exps/{'a' * 2}/{'b' * 38}/mine", commit)
    with pytest.raises(InputError, match="several experiments are named mine; say which by its commit"):
        versions.resolve("mine")


def test_a_model_that_is_nowhere_is_told_of_and_leaves_nothing_behind(here: Path) -> None:
    registry.register()
    with pytest.raises(InputError, match=r"v0\.0\.1 .* has no models/onyx: .* has models/classifier, models/drift"):
        revision.model_folder("v0.0.1", "models/onyx")
    run(here, "git", "rm", "-q", "--cached", "dvc.lock")
    run(here, "git", "commit", "-qm", "before the first run")
    with pytest.raises(InputError, match=r"HEAD \(commit .{7}\) has no models/classifier: .* has no models"):
        revision.model_folder("HEAD", "models/classifier")
    with pytest.raises(InputError, match="no remote is configured: `dvc remote add"):
        registry.push()
    shutil.rmtree(here / ".dvc/cache")
    with pytest.raises(InputError, match=r"is not in DVC's cache, and no remote is configured: `python"):
        revision.model_folder("v0.0.1", "models/classifier")
    (here / "empty").mkdir()
    run(here, "dvc", "remote", "add", "-q", "-d", "storage", str(here / "empty"))
    with pytest.raises(InputError, match=r"neither in DVC's cache nor on the remote storage: `python"):
        revision.model_folder("v0.0.1", "models/classifier")
    assert [path for path in (here / ".dvc/tmp/models").rglob("*") if path.is_file() or "new" in path.name] == []


def test_a_part_of_an_output_is_not_taken_for_the_output(here: Path) -> None:
    with pytest.raises(InputError, match="has no models/classifier/typo"):
        revision.model_folder("HEAD", "models/classifier/typo")
    part = revision.model_folder("HEAD", "models/classifier/model.json")
    assert part.read_bytes() == (here / "models/classifier/model.json").read_bytes()
    assert revision.model_folder("HEAD", "models/classifier/model.json") == part
    assert files(revision.model_folder("HEAD", "models/classifier")) == files(here / "models/classifier")


def test_a_damaged_file_is_not_taken(here: Path) -> None:
    cached = cached_file(here, "models/classifier/model.json")
    cached.chmod(0o644)
    cached.write_text("{}")
    with pytest.raises(InputError, match=r"models/classifier/model\.json of HEAD .* is damaged in DVC's cache"):
        revision.model_folder("HEAD", "models/classifier")
    assert not any((here / ".dvc/tmp/models").rglob("model.json"))
