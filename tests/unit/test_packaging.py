from __future__ import annotations

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
