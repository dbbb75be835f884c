"""The report on real runs: what it says is what the run left, nothing is loaded, nothing breaks it."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from scipy.stats import binomtest

from stages.core.errors import InputError
from tests.helpers import run
from tools.report.compare import all_metrics, chance, changed_params, interval, paired, sign_test, summary, verdict
from tools.report.data import Run, read_run
from tools.report.machine import environment
from tools.report.page import markdown, page
from tools.report.profile import Profile, read_profile
from tools.report.source import Source, default_baseline, open_source
from tools.shared.addresses import masked

EVIL = "<script>alert('x')</script>|`*_[a](http://b.c)_*`@all & \"q\""
DATE = "2026-11-25 07:00 UTC"
VOID = {"meta", "img", "br", "rect", "line", "circle", "path", "polyline"}


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    reader.text = " ".join(reader.text.split())
    return reader


def check_alone(text: str) -> Reader:
    """The page needs nothing beside it, runs nothing, and is small; returns it read."""
    assert len(text.encode()) <= 3_000_000
    found = read(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    loads = [value for name, value in found.attributes if name in ("src", "href", "srcset", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:image/webp;base64,")) for value in loads)
    assert "@import" not in text
    assert "url(" not in text
    return found


def rendered(text: str) -> Reader:
    """The Markdown as GitHub would show it, near enough; raw HTML is let through, as GitHub does."""
    assert len(text) < 65_000
    return read(MarkdownIt("commonmark", {"html": True}).enable("table").render(re.sub("<!--.*?-->", "", text)))


@pytest.fixture(scope="module")
def compared(finished_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished repository after an experiment, whose results lie in the workspace."""
    folder = tmp_path_factory.mktemp("compared") / "repository"
    shutil.copytree(finished_repository, folder, symlinks=True)
    run(folder, "dvc", "exp", "run", "-n", "other-seed", "-S", "train.seed=3", "-S", "train.lr=0.05", "evaluate")
    return folder


@pytest.fixture(scope="module")
def left(finished_repository: Path) -> dict[str, bytes]:
    """What a report reads of the finished run, by path."""
    names = ["params.yaml", "dvc.yaml", "dvc.lock", "data/profile/operators.csv"]
    for folder in ("metrics", "plots"):
        names += [str(p.relative_to(finished_repository)) for p in (finished_repository / folder).rglob("*.*")]
    return {name: (finished_repository / name).read_bytes() for name in names}


def state(files: dict[str, bytes], name: str = "workspace") -> Run:
    return read_run(Source(name, "a" * 40, "subject", "2026-11-25T07:00:00+00:00", None, None, (), files.get))


@pytest.fixture(scope="module")
def whole(left: dict[str, bytes]) -> Run:
    """The finished run, with small pictures."""
    small = state({path: content for path, content in left.items() if path.endswith("mistakes.png")})
    return replace(state(left), pictures=small.pictures)


def pages(one: Run, baseline: Run | None = None, profile: Profile | None = None) -> tuple[Reader, Reader]:
    """Both twins, checked and read."""
    machine = environment()
    html = check_alone(page(one, baseline, profile, machine, DATE))
    return html, rendered(markdown(one, baseline, machine, DATE))


# --- real runs ----------------------------------------------------------------------------------------------------


def test_the_workspace_of_a_first_run(finished_repository: Path, tmp_path: Path) -> None:
    html, twin = tmp_path / "page.html", tmp_path / "page.md"
    command = ("python", "-m", "tools.report", "--alone", "--html", str(html), "--markdown", str(twin))
    said = run(finished_repository, *command).stdout
    assert str(html) in said
    found, short = check_alone(html.read_text()), rendered(twin.read_text())
    top1 = json.loads((finished_repository / "metrics/evaluate.json").read_text())["top1"]
    for text in (found.text, short.text):
        assert f"Top-1 {top1:.2%}" in text
    assert "There is nothing to compare with" in found.text
    drift = json.loads((finished_repository / "metrics/drift.json").read_text())
    assert f"{drift['detection']['4']:.2%}" in found.text
    speed = json.loads((finished_repository / "metrics/profile.json").read_text())["images_per_second"]
    assert f"{speed:,.0f} training images a second" in found.text
    assert "convolution" in found.text
    assert "ui.perfetto.dev" in found.text
    assert found.tags.count("polyline") >= 8, "four curves, reliability, drift"
    assert found.tags.count("img") == 3, "mistakes, corruptions, memory"
    assert not [text for name, text in found.attributes if (name, text) == ("class", "missing note")]
    commit = run(finished_repository, "git", "rev-parse", "--short=7", "HEAD").stdout.strip()
    assert commit in found.text
    assert commit in short.text
    lock = (finished_repository / "dvc.lock").read_text()
    assert set(re.findall(r"[0-9a-f]{32}\.dir", found.text)) == set(re.findall(r"[0-9a-f]{32}\.dir", lock))


def test_an_experiment_against_the_commit_that_it_was_made_from(compared: Path) -> None:
    said = run(compared, "python", "-m", "tools.report", "other-seed").stdout
    assert said.startswith("report: report/report.html (")
    assert "report/" not in run(compared, "git", "status", "--porcelain").stdout, "git ignores the reports"
    found = check_alone((compared / "report/report.html").read_text())
    short = rendered((compared / "report/report.md").read_text())
    new = json.loads((compared / "metrics/evaluate.json").read_text())
    old = json.loads(run(compared, "git", "show", "HEAD:metrics/evaluate.json").stdout)
    assert new != old
    for text in (found.text, short.text):
        for number in (f"{new['nll']:.4f}", f"{old['nll']:.4f}", f"{new['nll'] - old['nll']:+.4f}"):
            assert number in text
        assert "train.seed" in text
        assert "other-seed" in text
    assert "No times in this run" in found.text, "an experiment keeps no profile"
    assert "No metrics/profile" not in found.text


def test_a_revision_is_read_as_it_was_committed(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compared)
    workspace, head, experiment = (read_run(open_source(name)) for name in ("workspace", "HEAD", "other-seed"))
    assert workspace.metrics["metrics/evaluate.json"] == experiment.metrics["metrics/evaluate.json"]
    assert workspace.metrics["metrics/evaluate.json"] != head.metrics["metrics/evaluate.json"]
    assert (workspace.params["train.seed"], head.params["train.seed"]) == (3, 0), "not what the profile ran with"
    assert experiment.operators == head.operators != [], "out of DVC's cache"
    assert "metrics/profile.json" in workspace.metrics
    assert "metrics/profile.json" not in head.metrics
    assert head.problems == workspace.problems == experiment.problems == []
    assert changed_params(workspace, head) == [("train.seed", "3", "0"), ("train.lr", "0.05", "0.01")]
    assert default_baseline(workspace.source) == "HEAD"
    assert default_baseline(experiment.source) == head.source.commit
    older = default_baseline(head.source)
    assert older == run(compared, "git", "rev-parse", "HEAD~1").stdout.strip(), "the results of the checkout"
    assert default_baseline(open_source(older)) is None
    by_commit = open_source(experiment.source.commit[:12])
    assert (by_commit.experiment, by_commit.baseline) == ("other-seed", head.source.commit)


def test_times_of_another_model_are_not_those_of_this_run(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC's run cache brings back what is tracked of an earlier run; the times beside it stay those of the last."""
    monkeypatch.chdir(compared)
    path = Path("metrics/profile.json")
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(json.loads(before) | {"model": "resnet34", "batch_size": 8}))
        found = read_run(open_source("workspace"))
    finally:
        path.write_bytes(before)
    (problem,) = found.problems
    assert problem.startswith("metrics/profile.json: of another run (model.name resnet34, train.batch_size 8)")
    assert "metrics/profile.json" not in found.metrics


def test_the_last_commit_with_other_results_is_the_baseline(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "git", "clone", "-q", str(compared), "clone")
    folder = tmp_path / "clone"
    first = run(folder, "git", "rev-parse", "HEAD").stdout.strip()
    commit = ("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm")
    (folder / "metrics/evaluate.json").write_text('{"top1": 0.5, "num_images": 10}')
    run(folder, *commit, "results", "-a")
    run(folder, *commit, "nothing that counts", "--allow-empty")
    monkeypatch.chdir(folder)
    assert default_baseline(open_source("HEAD")) == first
    assert default_baseline(open_source("workspace")) == first, "it is clean: HEAD has the same results"


def test_a_revision_that_does_not_exist_is_refused_in_a_line(compared: Path) -> None:
    result = run(compared, "python", "-m", "tools.report", "HEAD", "--against", "other-sed", check=False)
    assert result.returncode == 2
    said = "report: error: 'other-sed': no such git revision or experiment; did you mean other-seed?\n"
    assert result.stderr == said


def test_the_nearest_names_are_told(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compared)
    with pytest.raises(InputError, match="'other-sead': no such git revision or experiment; did you mean other-seed"):
        open_source("other-sead")
    with pytest.raises(InputError, match="did you mean HEAD"):
        open_source("HAED")
    for name in ("-n", "no/such/thing", "HEAD~99", "refs/exps"):
        with pytest.raises(InputError, match=f"{name!r}: no such git revision or experiment"):
            open_source(name)
    monkeypatch.chdir(compared.parent)
    with pytest.raises(InputError, match="no DVC repository here"):
        open_source("workspace")


def test_the_difference_is_tested_image_by_image(left: dict[str, bytes], whole: Run) -> None:
    """Against a run that has the first 40 images right, and the others as this one."""
    path = "plots/evaluate/confusion.csv"
    header, *rows = left[path].decode().splitlines()
    better = [",".join([row.split(",")[0]] * 2) if number < 40 else row for number, row in enumerate(rows)]
    improved = state(left | {path: "\n".join([header, *better]).encode()})
    wins = sum(a != b for a, b in zip(rows, better, strict=True))
    assert wins > 5
    assert paired(improved, whole) == (wins, 0)
    assert paired(whole, improved) == (0, wins)
    assert chance(improved, whole) == pytest.approx(binomtest(wins, wins).pvalue)
    top1 = sum(row.split(",")[0] == row.split(",")[1] for row in better) / len(better)
    metrics = whole.metrics | {"metrics/evaluate.json": whole.metrics["metrics/evaluate.json"] | {"top1": top1}}
    improved = replace(improved, metrics=metrics)
    points = 100 * (top1 - whole.metrics["metrics/evaluate.json"]["top1"])
    assert verdict(improved, whole).headline == f"Better by {points:.1f} points of top-1"
    assert verdict(whole, improved).headline == f"Worse by {points:.1f} points of top-1"
    marks = [next(line.mark for line in summary(*two)) for two in ((improved, whole), (whole, improved))]
    assert marks == ["better", "worse"]


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 40), (700, 800)])
def test_the_sign_test_is_the_binomial_test(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_wilsons() -> None:
    expected = binomtest(47, 50).proportion_ci(method="wilson")
    assert interval(0.94, 50) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert interval(1.0, 50)[1] == pytest.approx(1.0)


def test_a_run_against_itself_differs_in_nothing(whole: Run) -> None:
    one = whole
    assert verdict(one, one).headline == "Same predictions"
    assert {line.mark for line in summary(one, one)} == {"same"}
    assert changed_params(one, one) == []
    html, _ = pages(one, one)
    assert html.tags.count("polyline") >= 12


def test_every_number_of_the_metrics_is_in_the_page(whole: Run) -> None:
    one = whole
    html, short = pages(one)
    numbers = [value for _, rows in all_metrics(one, None) for _, value, _ in rows]
    assert len(numbers) > 30
    for number in numbers:
        assert number in html.text
        assert number in short.text


# --- what may be missing, damaged or hostile ----------------------------------------------------------------------

SAID_WHEN_MISSING = {
    "metrics/drift.json": "This run has no drift measurements",
    "metrics/profile.json": "No times in this run",
    "metrics/evaluate.json": "run `dvc repro`",
    "plots/evaluate/confusion.csv": "No plots/evaluate/confusion.csv",
    "plots/evaluate/reliability.json": "No plots/evaluate/reliability.json",
    "plots/evaluate/mistakes.png": "There is no picture of this in the run: dvc repro evaluate makes it.",
    "plots/drift/corruptions.png": "dvc repro drift makes it.",
    "params.yaml": "There is no params.yaml",
    "dvc.lock": "no dvc.lock",
}


@pytest.mark.parametrize("path", SAID_WHEN_MISSING)
def test_what_is_missing_is_told(left: dict[str, bytes], whole: Run, path: str) -> None:
    lacking = state({name: content for name, content in left.items() if name != path})
    assert lacking.problems == []
    html, _ = pages(lacking, whole)
    assert SAID_WHEN_MISSING[path] in html.text
    pages(replace(whole, pictures={}), lacking)


def test_no_curves_and_nothing_at_all(left: dict[str, bytes]) -> None:
    html, _ = pages(state({name: content for name, content in left.items() if not name.endswith(".tsv")}))
    assert "No curves in metrics/train" in html.text
    html, short = pages(state({}))
    for text in (html.text, short.text):
        assert "No result yet" in text


DAMAGED = [b"{", b"\xff\xfe\x00", b"", b"[]", b"null", b"a,b\n1", b"a\tb\n1\t2", b'{"top1": NaN, "x": {"y": "z"}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_are_named_and_the_rest_is_shown(left: dict[str, bytes], whole: Run, content: bytes) -> None:
    damaged = state(dict.fromkeys(left, content))
    html, _ = pages(damaged, whole)
    assert len(damaged.problems) >= 1
    for problem in damaged.problems:
        assert problem.split(":")[0] in left
        assert problem in html.text
    for folder in ("metrics", "plots/evaluate", "plots/drift"):
        partly = {path: content if path.startswith(folder) else kept for path, kept in left.items()}
        html, _ = pages(replace(state(partly), pictures={}), whole)
        assert "damaged" not in html.text


def test_names_are_text_and_never_markup(left: dict[str, bytes]) -> None:
    quoted = '"' + EVIL.replace('"', '""') + '"'

    def renamed(path: str) -> bytes:
        return left[path].decode().replace("arrow", quoted).encode()

    files = {path: renamed(path) for path in ("plots/evaluate/per_class.csv", "plots/evaluate/confusion.csv")}
    params = left["params.yaml"].decode().replace("source: sample", f"source: {json.dumps(EVIL)}").encode()
    lock = left["dvc.lock"].decode().replace("source: sample", f"source: {json.dumps(EVIL)}").encode()
    one = state(left | files | {"params.yaml": params, "dvc.lock": lock})
    one = replace(one, source=replace(one.source, subject=EVIL, experiment=EVIL))
    assert one.problems == []
    html, short = pages(one, state(left))
    for found in (html, short):
        assert found.text.count(EVIL) >= 3
        assert "script" not in found.tags
        assert not [value for _, value in found.attributes if "b.c" in value and value != EVIL]
    assert "a" not in short.tags


def test_addresses_are_shown_without_their_password(left: dict[str, bytes]) -> None:
    address = b"source: https://user:secret@example.com/images.tgz"
    changed = {name: left[name].replace(b"source: sample", address) for name in ("params.yaml", "dvc.lock")}
    one = state(left | changed)
    assert one.params["data.source"] == "https://***@example.com/images.tgz"
    with_at = "a@b@c"
    assert masked(f"from https://user:{with_at}@example.com/a@b.tgz, by me@example.com") == (
        "from https://***@example.com/a@b.tgz, by me@example.com"
    )
    machine = environment()
    assert "secret" not in page(one, None, None, machine, DATE) + markdown(one, state(left), machine, DATE)


def test_params_changed_after_the_run_are_told(left: dict[str, bytes]) -> None:
    changed = left["params.yaml"].replace(b"epochs: 2", b"epochs: 7")
    one = state(left | {"params.yaml": changed})
    assert one.stale == ["train.epochs (ran with 2, now 7)"]
    assert one.params["train.epochs"] == 2
    html, short = pages(one)
    assert "not what these results were made with: train.epochs (ran with 2, now 7)" in html.text
    assert "train.epochs (ran with 2, now 7)" in short.text


def test_other_validation_images_are_told(left: dict[str, bytes]) -> None:
    packed, lock = (
        re.sub(rf"(path: {out}\n\s+hash: md5\n\s+md5: )\w+".encode(), rb"\g<1>0123", content)
        for out, content in (("data/processed", left["dvc.lock"]), ("data/(?:raw|processed)", left["dvc.lock"]))
    )
    one, other = state(left | {"dvc.lock": lock}), state(left)
    assert paired(one, other) is None
    in_another_size = state(left | {"dvc.lock": packed})
    assert packed not in (left["dvc.lock"], lock)
    assert paired(in_another_size, other) == (0, 0)
    for found in pages(in_another_size, other):
        assert "the two runs did not use the same images" not in found.text
    for found in pages(one, other):
        assert "the two runs did not use the same images" in found.text


def test_a_thousand_classes_and_noisy_pictures_fit(left: dict[str, bytes]) -> None:
    names = [f"class-{'x' * 60}-{number}" for number in range(1000)]
    table = "class,precision,recall,f1,average_precision,num_images\n"
    table += "".join(f"{name},0.5,0.5,{number / 1000},0.5,50\n" for number, name in enumerate(names))
    pairs = "actual,predicted\n" + "".join(f"{a},{b}\n" for a, b in zip(names, names[1:] + names[:1], strict=True))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1150, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG", compress_level=1)
    pictures = {path: buffer.getvalue() for path in left if path.endswith(".png")}
    files = {"plots/evaluate/per_class.csv": table.encode(), "plots/evaluate/confusion.csv": pairs.encode()}
    html, short = pages(state(left | files | pictures), state(left))
    assert "1000 classes: too many for a matrix" in html.text
    assert names[999] in html.text
    assert names[0] in short.text
    assert html.tags.count("img") == 2


# --- the profile --------------------------------------------------------------------------------------------------


def test_the_time_of_a_step_is_shared_out(finished_repository: Path, make_trace: Callable[..., Path]) -> None:
    profile = read_profile(finished_repository / "data/profile/trace-1.json.gz")
    assert profile is not None
    assert profile.num_steps == 2
    shares = dict(profile.categories)
    assert sum(shares.values()) == pytest.approx(profile.step_ms, rel=1e-6)
    assert min(shares["convolution"], shares["optimizer"], shares["loader"]) > 0
    calls = {name: count for name, _, count in profile.operators}
    assert calls["aten::convolution_backward"] >= 1


def test_a_damaged_trace_is_as_none(finished_repository: Path, tmp_path: Path) -> None:
    content = bytearray((finished_repository / "data/profile/trace-1.json.gz").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (tmp_path / "trace.json.gz").write_bytes(content)
    assert read_profile(tmp_path / "trace.json.gz") is None


@pytest.fixture
def make_trace(tmp_path: Path) -> Callable[..., Path]:
    import gzip

    def make(*events: tuple[str, str, float, float]) -> Path:
        rows = [{"ph": "X", "cat": c, "name": n, "tid": 1, "ts": ts, "dur": dur} for c, n, ts, dur in events]
        path = tmp_path / "trace.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"traceEvents": rows}).encode()))
        return path

    return make


STEP = ("user_annotation", "ProfilerStep#0", 0.0, 10_000.0)


def test_time_is_counted_where_it_is_spent(make_trace: Callable[..., Path]) -> None:
    profile = read_profile(
        make_trace(
            STEP,
            ("user_annotation", "load", 0.0, 2000.0),
            ("cpu_op", "aten::copy_", 500.0, 1000.0),
            ("user_annotation", "train_step", 2000.0, 8000.0),
            ("cpu_op", "aten::conv2d", 2000.0, 3000.0),
            ("cpu_op", "aten::add", 2500.0, 1000.0),
            ("user_annotation", "Optimizer.step#Muon.step", 6000.0, 3000.0),
            ("cpu_op", "aten::mm", 6000.0, 2500.0),
        )
    )
    assert profile is not None
    assert dict(profile.categories) == pytest.approx(
        {"loader": 2, "convolution": 2, "other": 1, "optimizer": 3, "Python, and waiting": 2}
    )
    assert profile.operators[0] == ("aten::mm", 2.5, 1)
    assert not profile.on_gpu


def test_on_a_gpu_its_kernels_are_counted(make_trace: Callable[..., Path]) -> None:
    profile = read_profile(
        make_trace(
            STEP,
            ("cpu_op", "aten::conv2d", 0.0, 9000.0),
            ("kernel", "sm90_xmma_fprop_implicit_gemm_bf16", 100.0, 4000.0),
            ("kernel", "nvjet_gemm_128x64", 5000.0, 1000.0),
            ("gpu_memcpy", "Memcpy HtoD", 6000.0, 500.0),
        )
    )
    assert profile is not None
    assert profile.on_gpu
    assert dict(profile.categories) == pytest.approx(
        {"convolution": 4, "GPU idle": 4.5, "matrix products": 1, "copies and casts": 0.5}
    )


def test_a_cut_trace_is_no_trace(finished_repository: Path, make_trace: Callable[..., Path], tmp_path: Path) -> None:
    whole = (finished_repository / "data/profile/trace-1.json.gz").read_bytes()
    cut = tmp_path / "cut.json.gz"
    for content in (whole[: len(whole) // 2], b"", b"{}"):
        cut.write_bytes(content)
        assert read_profile(cut) is None
    assert read_profile(make_trace()) is None
    assert read_profile(tmp_path / "none.json.gz") is None
