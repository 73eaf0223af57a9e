from __future__ import annotations

import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_and_sdist_hold_what_they_should_and_a_stray_file_is_found(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=240,
    )
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    check = [sys.executable, str(ROOT / "release" / "check_wheel.py")]
    subprocess.run([*check, str(wheel), str(sdist)], check=True, timeout=60)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tests/test_x.py", "")
    done = subprocess.run([*check, str(wheel)], capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert b"holds tests/test_x.py" in done.stderr


def test_the_wheel_suits_every_python_that_is_here(tmp_path: Path) -> None:
    """Compiled without a warning, and imported; `make dist` runs it with all that it needs."""
    subprocess.run(
        [sys.executable, "-m", "build", "-n", "--wheel", "-o", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=240,
    )
    (wheel,) = tmp_path.glob("*.whl")
    version = wheel.name.split("-")[1]
    pythons = runpy.run_path(str(ROOT / "release" / "dist.py"))["pythons"]()
    assert pythons
    for name, python in pythons.items():
        place = tmp_path / name
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        compiled = [python, "-W", "error", "-m", "compileall", "-q", str(place / "stowray")]
        subprocess.run(compiled, check=True, timeout=240)
        said = subprocess.run(
            [python, "-c", "import stowray; print(stowray.__version__)"],
            cwd=place,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(place)},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.stdout.strip() == version, name


def test_notices_have_every_package_once_and_no_word_for_what_is_not_there() -> None:
    made = runpy.run_path(str(ROOT / "release" / "dist.py"))["notices"]
    about = {"Version": "1", "License": "MIT", "URL": "https://x.example", "NoticeText": "UNKNOWN"}
    text = made(
        [
            {**about, "Name": "b", "LicenseText": "Permission is granted\n"},
            {**about, "Name": "A", "LicenseText": "UNKNOWN", "NoticeText": "Made by A"},
            {**about, "Name": "c", "LicenseText": "UNKNOWN"},
        ]
    )
    assert "UNKNOWN" not in text
    heads = [part.strip().splitlines()[0] for part in text.split("-" * 80)]
    assert heads == ["A 1", "b 1", "c 1"]
    for said in ("Permission is granted", "Made by A", "ships no text of its licence"):
        assert text.count(said) == 1
