"""The wheel: what it installs, and that it runs away from the source."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tracked sources, so that nothing untracked can hide a missing file."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    source = folder / "source"
    for name in filter(None, names.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_our_packages_and_the_bundled_material_and_nothing_named_kernels(
    wheel: Path,
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    # A package "kernels" would replace Hugging Face's, which transformers imports.
    assert {t for t in tops if ".dist-info" not in t} == {
        "logitcache",
        "distill",
        "logitcache_kernels",
    }
    bundled = [n for n in names if n.startswith("distill/bundled/")]
    for page in ("logitcache/templates/inspect", "distill/templates/report"):  # and its style
        assert {f"{page}.html", f"{page}.css"} <= {*names}
    data = ("text/corpus.jsonl", "text/LICENSE", "teacher1/model.safetensors")
    for wanted in (*data, "suite.jsonl", "laws.yaml"):
        assert f"distill/bundled/{wanted}" in bundled
    assert sum(zipfile.ZipFile(wheel).getinfo(n).file_size for n in bundled) < 12_000_000


def test_installed_wheel_runs_away_from_the_source(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*words: str) -> str:
        finished = subprocess.run(
            [sys.executable, *words], cwd="/", env=environment, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    place = run(
        "-c", "import distill, logitcache_kernels as k; print(distill.__file__, k.__file__)"
    )
    assert place.count(str(target)) == 2
    assert "build" in run("-m", "logitcache", "--help")
    assert "demo" in run("-m", "distill", "--help")
    sizes = run(
        "-c", "from distill.demo import TEACHER1; print((TEACHER1 / 'config.json').is_file())"
    )
    assert sizes.strip() == "True"
