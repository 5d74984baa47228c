"""A built wheel carries conf/ and works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's files in a folder of their own; built from a copy, so that the checkout stays clean."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for name in ("ssl_lab", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "conf" / "local" / "default.yaml").write_text("seed: 99\n")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def ssl_lab(site, cwd, *words):
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ssl_lab", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.slow
def test_wheel_holds_every_configuration_but_the_machines_own(site):
    shipped = {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml") if p.parent.name != "local"}
    assert {p.relative_to(site / "ssl_lab" / "conf") for p in (site / "ssl_lab" / "conf").rglob("*.yaml")} == shipped
    code = {p.relative_to(ROOT) for p in (ROOT / "ssl_lab").rglob("*.py")}
    assert {p.relative_to(site) for p in (site / "ssl_lab").rglob("*.py")} == code
    assert not (site / "tests").exists()


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(site, tmp_path):
    for words in (["--help"], ["train", "--help"], ["list"], ["experiment=quickstart", "--cfg", "job"]):
        done = ssl_lab(site, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert "quickstart" in done.stdout
    done = ssl_lab(site, tmp_path, "experiment=quickstrt")
    assert done.returncode == 2
    assert "quickstart" in done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import ssl_lab; print(ssl_lab.__file__)"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert str(site) in where.stdout


@pytest.mark.slow
def test_wheel_trains(site, tmp_path):
    words = ["experiment=quickstart", "duration=2steps", "eval=[]", "data.batch_size=8", "trainer.precision=32-true"]
    done = ssl_lab(site, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quickstart" / "0" / "config.yaml").is_file()
