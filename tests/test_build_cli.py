"""``logitcache build`` and ``info`` as a user meets them: results, messages, exit codes."""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny import make_model, make_tokenizer, sentences, write_jsonl

import logitcache.estimate
import logitcache.layout
from logitcache import open_store
from logitcache.cli import cli
from logitcache.files import lock
from logitcache.store import load_store

ROOT = Path(__file__).parents[1]
PACKAGES = {  # each may import itself and those before it
    "logitcache_kernels": ROOT / "kernels" / "logitcache_kernels",
    "logitcache": ROOT / "logitcache",
    "distill": ROOT / "distill",
}
FORMAT_MODULES = (
    *("store", "codec", "packing", "files", "documents", "config", "errors", "info"),
    *("layout", "levels", "draws", "words", "fields", "support", "shards"),
)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(code: int, *arguments: object) -> str:
    """Run a command that must exit with this code; gives what it says on stderr."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def command(tmp_path, teacher1, corpus):
    """The shortest build: one teacher, into a folder of this test."""
    return ["build", "--teacher1", teacher1, "--data", corpus, "--seq-len", 48] + [
        "--out",
        tmp_path / "store",
    ]


# --- a build that works --------------------------------------------------------------------------


def test_build_reports_what_info_says_and_the_next_command(command, tmp_path):
    result = run(*command)
    assert result.exit_code == 0, result.output
    out = tmp_path / "store"
    assert f"next: distill train --store {out}" in result.stdout
    assert "teacher1: " in result.stderr
    info = run("info", out)
    assert info.exit_code == 0
    assert info.stdout.strip() in result.stdout
    assert "complete" in info.stdout
    record = json.loads((tmp_path / "store.run.json").read_text())
    assert record["config"]["seq_len"] == 48
    assert record["environment"]["versions"]["torch"]


def test_info_json_holds_what_is_promised(built):
    result = run("info", built.path, "--json")
    info = json.loads(result.stdout)
    reader = open_store(built.path)
    rows = reader.read_rows(range(len(reader)))
    assert info["complete"] is True
    assert (info["rows"], info["seq_len"]) == rows.tokens.shape
    assert info["tokens"] == (rows.segments > 0).sum()
    assert info["valid_tokens"] == (rows.labels() != -100).sum()
    files = [path for path in built.path.rglob("*") if path.is_file()]
    assert info["bytes"] == sum(path.stat().st_size for path in files)
    assert (info["vocab_size"], info["estimator"]) == (300, "sampled")
    assert [teacher["name"] for teacher in info["teachers"]] == ["teacher1", "teacher2"]
    batch = reader[:]
    at = (batch.labels != -100).reshape(-1)
    for described, teacher in zip(info["teachers"], batch.teachers, strict=True):
        data = [p for p in files if f"/{described['name']}/" in str(p)]
        size = sum(path.stat().st_size for path in data)
        assert described["bytes_per_token"] == pytest.approx(size / info["tokens"], abs=1e-3)
        support = (teacher.ids_PK[at] >= 0).sum(1).mean()
        assert described["mean_support"] == pytest.approx(support, abs=1e-3)
        assert 0.3 < described["mass_covered"] < 1


def test_quiet_keeps_stderr_empty_and_json_is_one_document(command, tmp_path):
    result = run(*command, "--quiet", "--json")
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["complete"] is True
    assert document["tokens_per_second"]["teacher1"] > 0


def test_a_finished_store_is_left_alone_and_says_so(command, tmp_path):
    run(*command)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*/*") if p.is_file()}
    again = run(*command)
    assert again.exit_code == 0
    assert "already complete; nothing was changed" in again.stderr
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*/*") if p.is_file()}
    assert after == before


def test_dry_run_says_what_would_be_built_and_writes_nothing(command, tmp_path):
    result = run(*command, "--dry-run", "--json")
    planned = json.loads(result.stdout)
    assert not (tmp_path / "store").exists()
    run(*command)
    info = json.loads(run("info", tmp_path / "store", "--json").stdout)
    for key in ("rows", "seq_len", "tokens", "valid_tokens"):
        assert planned[key] == info[key]
    assert planned["store_exists"] is False
    again = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert again["bytes_to_write"] == again["estimated_seconds"] == 0
    assert "teacher1    " in run(*command, "--dry-run").stdout


@pytest.mark.parametrize("positions", [2**18, 48 * 20])
@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_dry_run_foretells_the_bytes_within_a_tenth(
    tmp_path, monkeypatch, teacher1, teacher2, positions, estimator
):
    """From 16 of 200 rows, in one shard and in ten."""
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", positions)
    monkeypatch.setattr(logitcache.estimate, "_PROBE_TOKENS", {"cpu": 0, "cuda": 0})
    texts = sentences(300, seed=8) + sentences(60, seed=9, words=60)
    data = write_jsonl(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    command = ["build", "--teacher1", teacher1, "--teacher2", teacher2, "--data", data]
    command += ["--seq-len", 48, "--estimator", estimator, "--out", tmp_path / "store"]
    planned = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert planned["rows"] > 150
    run(*command)
    built = json.loads(run("info", tmp_path / "store", "--json").stdout)
    assert planned["bytes_to_write"] == pytest.approx(built["bytes"], rel=0.1)
    assert planned["estimated_bytes"] == pytest.approx(built["bytes"], rel=0.1)
    for found, wanted in zip(planned["teachers"], built["teachers"], strict=True):
        assert found["bytes_per_token"] == pytest.approx(wanted["bytes_per_token"], rel=0.1)


def test_dry_run_of_a_build_that_does_not_fit_exits_with_6(command, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    small = usage._replace(free=(1 << 20) + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    monkeypatch.setattr(logitcache.estimate, "_RESERVE_BYTES", 1 << 20)
    said = fails(6, *command, "--dry-run")
    assert "disk full: " in said
    assert "bytes more, or give --out on another disk" in said
    assert not (tmp_path / "store").exists()


def test_dry_run_refuses_another_build_as_the_build_does(command, tmp_path):
    run(*command)
    assert "min_prob: this command" in fails(2, *command, "--min-prob", 0.01, "--dry-run")


def test_several_files_after_one_data_flag_or_several_flags_are_the_same(
    command, tmp_path, teacher1
):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": sentences(1, n)[0]}]) for n in "ab"]
    plans = [
        json.loads(
            run("build", "--teacher1", teacher1, *data, "--out", tmp_path / "s", *rest).stdout
        )
        for rest in [("--seq-len", 32, "--dry-run", "--json")]
        for data in (["--data", *files], ["--data", files[0], "--data", files[1]])
    ]
    for key in ("rows", "tokens", "estimated_bytes"):
        assert plans[0][key] == plans[1][key]
    assert plans[0]["valid_tokens"] > 20


def test_a_flag_goes_before_set_before_the_file_before_the_default(command, tmp_path):
    config = tmp_path / "build.yaml"
    config.write_text("estimator: topk\ntop_k: 3\nmin_prob: 0\nseed: 7\n")
    result = run(*command, "--config", config, "--set", "top_k=4", "--set", "seed=8", "--top-k", 5)
    assert result.exit_code == 0, result.output
    attributes = load_store(tmp_path / "store").teachers["teacher1"]
    assert (attributes["estimator"], attributes["top_k"], attributes["seed"]) == ("topk", 5, 8)
    assert attributes["precision"] == "standard"
    batch = open_store(tmp_path / "store")[:]
    assert (batch.teachers[0].ids_PK >= 0).sum(1).max() == 5
    assert batch.teachers[0].inclusion_PK is None


def test_messages_train_on_what_assistants_say(tmp_path, teacher1):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the king"}]
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    out = tmp_path / "store"
    result = run("build", "--teacher1", teacher1, "--data", data, "--seq-len", 64, "--out", out)
    assert result.exit_code == 0, result.output
    reader = open_store(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher1)
    labels = reader[0].labels
    assert tokenizer.decode(labels[labels != -100]) == "the king<|im_end|>"


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", '{"text":"x y"}\n{"text":null}\n', 'a.jsonl:2: "text" is null'),
        ("a.jsonl", '{"other":"x"}\n', 'a.jsonl:1: expected a column "text" or "messages"'),
        ("a.jsonl", '{"text":"x"', "a.jsonl:1: not JSON"),
        ("a.jsonl", '[{"text":"x"}]', "a.jsonl:1: expected an object, found list"),
        ("a.txt", b"caf\xe9", "a.txt:1:4: not UTF-8"),
        (
            "a.jsonl",
            '{"text":" "}\n{"text":""}\n',
            "nothing to train on: of 2 documents 2 are empty",
        ),
        ("a.parquet", "no parquet", "a.parquet: not a Parquet file"),
        (None, None, "gone.jsonl: no such file"),
    ],
)
def test_bad_data_exits_with_3_and_leaves_nothing(tmp_path, teacher1, name, content, message):
    path = tmp_path / (name or "gone.jsonl")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "store"
    said = fails(3, "build", "--teacher1", teacher1, "--data", path, "--out", out, "--seq-len", 32)
    assert message in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "seqlen=3"], "seqlen: no such setting"),
        (["--set", "seed"], "expected key=value"),
        (["--set", "seed=abc"], "seed: "),
        (["--set", "seed=[1"], "--set seed=[1"),
        (["--set", "min_prob=nan"], "min_prob: "),
        (["--set", "estimator=[topk]"], "estimator: "),
        (["--set", "device=mps"], "device: expected auto, cpu or cuda[:N], found 'mps'"),
        (["--set", "dtype=int8"], "dtype: "),
        (["--seq-len", "1"], "seq_len: "),
        (["--seq-len", "4096"], "teacher1 reads at most 128 tokens, --seq-len is 4096"),
        (["--threshold", "0.001"], "threshold >= 0.0115"),
        (["--shard", "2/2"], "expected I/N with I < N, found 2/2"),
        (["--shard", "one"], "shard: "),
        (["--fresh", "--shard", "0/2"], "one worker would delete what the others have written"),
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
        (["--teacher1", "gone"], "gone: no such model folder"),
        (["--teacher1", "."], "no config.json in it"),
    ],
)
def test_wrong_settings_exit_with_2_and_leave_nothing(
    command, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(2, *command, *change)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", ["a: [", "- a", "wrong: 1", b"\xff"])
def test_configuration_files_that_cannot_be_used_exit_with_2(command, tmp_path, content):
    config = tmp_path / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(2, *command, "--config", config)


def test_settings_that_are_missing_are_all_named():
    said = fails(2, "build")
    for name in ("teacher1", "data", "out"):
        assert f"{name}: this setting is needed" in said


def test_teachers_with_different_tokenizers_exit_with_4(command, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    make_tokenizer(other, merges_seed=5)
    said = fails(4, *command, "--teacher2", other)
    assert "its tokenizer is not teacher 1's: " in said
    assert "ids differ (expected / found): 2" in said
    assert not (tmp_path / "store").exists()


def test_a_teacher_with_fewer_outputs_than_tokens_exits_with_4(command, tmp_path):
    small = make_model(tmp_path / "small", seed=1, vocab_size=200)
    said = fails(4, *command, "--teacher1", small)
    assert "teacher1 has 200 output rows, its tokenizer 300 tokens" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_damaged_teacher_exits_with_4_and_the_mended_one_builds(
    command, tmp_path, teacher1, name
):
    broken = Path(shutil.copytree(teacher1, tmp_path / "broken"))
    whole = (broken / name).read_bytes()
    (broken / name).write_bytes(whole[:40])
    said = fails(4, *command, "--teacher1", broken)
    assert f"{broken}: " in said
    (broken / name).write_bytes(whole)
    assert run(*command, "--teacher1", broken).exit_code == 0


def test_a_teacher_without_safetensors_exits_with_2(command, tmp_path, teacher1):
    bare = Path(shutil.copytree(teacher1, tmp_path / "bare"))
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    assert "expected weights as safetensors" in fails(2, *command, "--teacher1", bare)


def test_an_output_folder_that_holds_something_else_is_not_touched(command, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for fresh in ([], ["--fresh"]):
        assert "found other files (notes.txt, ...)" in fails(2, *command, *fresh)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        assert "expected a folder, found a file" in fails(2, *command, "--out", path)
    assert (tmp_path / "file").read_text() == "mine"


def test_another_build_in_the_folder_exits_with_2_and_names_what_changed(
    command, tmp_path, teacher2, built
):
    out = Path(shutil.copytree(built.path, tmp_path / "store"))
    changes = {
        "seq_len: this command 32, store 48": ["--seq-len", 32],
        "teacher1: min_prob: this command 0.01, store 0.005": ["--min-prob", 0.01],
        "teacher1: seed: this command 1, store 0": ["--set", "seed=1"],
        "teacher1: dtype: this command bfloat16, store float32": ["--set", "dtype=bfloat16"],
        "teacher1: model.weights_sha256: ": ["--teacher1", teacher2],
    }
    before = {path: path.read_bytes() for path in out.rglob("*/*") if path.is_file()}
    for message, change in changes.items():
        said = fails(2, *command, *change)
        assert "holds another build" in said
        assert message in said
        assert "--fresh" in said
    assert before == {path: path.read_bytes() for path in out.rglob("*/*") if path.is_file()}


def test_a_locked_store_exits_with_5(command, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    with lock(out / "build.lock"):
        assert f"{out}: locked by process {os.getpid()} on " in fails(5, *command)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_exits_with_6(command, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "no permission" in fails(6, *command)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_exits_with_6_and_the_build_goes_on_afterwards(command, tmp_path, corpus):
    """A limit on the size of a file stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 6, result.output
    assert "error: file too large" in result.stderr
    assert not load_store(tmp_path / "store").missing("rows")
    assert run(*command).exit_code == 0
    open_store(tmp_path / "store")[:]


def test_json_errors_are_one_document_with_the_exit_code(command, tmp_path):
    result = run(*command, "--seq-len", 4096, "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["exit_code"] == 2
    assert "reads at most 128 tokens" in document["error"]
    assert document["hint"] == "use --seq-len 128 or less"


def test_info_of_what_is_no_store_exits_with_4(tmp_path, corpus, teacher1):
    assert "no such store" in fails(4, "info", tmp_path / "gone")
    assert "found a file without a manifest" in fails(4, "info", corpus)
    assert "found a folder without a manifest" in fails(4, "info", teacher1)
    (tmp_path / "zarr.json").write_text("{")
    assert "zarr.json: cannot be read" in fails(4, "info", tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {"logitcache": {"format": 1}}}')
    assert "damaged manifest" in fails(4, "info", tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {"logitcache": {"format": 2}}}')
    assert "format: written by format 2, this version reads 1" in fails(4, "info", tmp_path)


# --- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_75_and_the_same_command_goes_on(
    command, tmp_path, monkeypatch, teacher2, number
):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", 48)  # 21 shards of one row
    first = tmp_path / "store" / "commits" / "teacher1-000000.json"
    ended = threading.Event()

    def send() -> None:
        while not first.exists() and not ended.is_set():
            time.sleep(0.001)
        if not ended.is_set():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        stopped = run(*command, "--teacher2", teacher2)
    finally:
        ended.set()
        thread.join()
    assert stopped.exit_code == 75, stopped.output
    assert f"{number.name}: stopping at the next safe point" in stopped.stderr
    assert "run the same command again" in stopped.stderr
    info = run("info", tmp_path / "store")
    assert "INCOMPLETE" in info.stdout
    again = run(*command, "--teacher2", teacher2)
    assert again.exit_code == 0
    assert "resuming" in again.stderr
    assert json.loads(run("info", tmp_path / "store", "--json").stdout)["complete"] is True


def test_a_second_signal_ends_at_once_with_130(command, tmp_path):
    script = """
import os, signal, sys, threading, time
from pathlib import Path
from logitcache.cli import main
def send():
    while not Path(sys.argv[-1], "zarr.json").exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send, daemon=True).start()
main()
"""
    arguments = [str(argument) for argument in command]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, check=False
    )
    assert ended.returncode == 130, ended.stderr.decode()
    assert run(*command).exit_code == 0


# --- imports -------------------------------------------------------------------------------------


def imported(code: str) -> set[str]:
    """Modules that are loaded after some code has run in a new process."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(done.stdout.splitlines())


def test_help_imports_no_torch():
    for package in ("logitcache", "distill"):
        code = (
            "import runpy, sys\n"
            f"sys.argv = ['{package}', '--help']\n"
            "try:\n"
            f"    runpy.run_module('{package}', run_name='__main__')\n"
            "except SystemExit as ended:\n"
            "    assert ended.code == 0\n"
        )
        modules = imported(code)
        assert f"{package}.cli" in modules
        assert not modules & {"torch", "transformers", "zarr", "pydantic", "datasets"}


def test_format_modules_import_no_torch():
    modules = imported(";".join(f"import logitcache.{name}" for name in FORMAT_MODULES))
    assert {f"logitcache.{name}" for name in FORMAT_MODULES} <= modules
    assert not modules & {"torch", "transformers"}


def test_commands_run_as_modules():
    for package in ("logitcache", "distill"):
        done = subprocess.run(
            [sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=True
        )
        assert f"Usage: {package} " in done.stdout


def imports(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def test_imports_run_one_way_from_kernels_to_store_to_training():
    names = list(PACKAGES)
    for number, (name, folder) in enumerate(PACKAGES.items()):
        files = list(folder.rglob("*.py"))
        assert len(files) > 5
        for path in files:
            later = imports(path) & {*names[number + 1 :], "tests", "benchmarks"}
            assert not later, f"{path}: {name} imports {later}"


def test_kernels_import_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "logitcache_kernels"}
    for path in PACKAGES["logitcache_kernels"].rglob("*.py"):
        assert imports(path) <= allowed, path
