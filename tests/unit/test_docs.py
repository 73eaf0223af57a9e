from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stowray.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```sh([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def build(target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), str(target)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_site_is_made_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr[-2000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 12
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert "<script" not in html
        for target in re.findall(r'href="([^"#]+)"', html):
            if "://" not in target:
                assert (page.parent / target).resolve().is_file(), f"{page.name}: {target}"
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"<h3>{name}</h3>" in commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_shell_and_python_blocks_are_well_formed(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    for mark, code in BLOCK.findall(source):
        # What no test can run says why.
        assert mark.strip() in ("", "root") or re.fullmatch(r" not-run: .{10,}", mark), mark
        subprocess.run(["bash", "-n", "-c", code], check=True, timeout=60)
    for code in PYTHON.findall(source):
        compile(code, str(page), "exec")


def test_the_manual_has_every_command_option_and_status(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "docs" / "man.py"), str(tmp_path)], check=True, timeout=120
    )
    made = (tmp_path / "stowray.1").read_text(encoding="utf-8")
    kept = (ROOT / "docs" / "stowray.1").read_text(encoding="utf-8")
    for name in COMMANDS:
        for source in (made, kept):
            assert f"\n.B stowray {name} " in source, f"{name}: make docs writes docs/stowray.1"
    assert ".B \\-\\-log\\-json" in made
    assert "\n.B 130\n" in made


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff here")
def test_the_manual_is_troff_without_a_complaint(tmp_path: Path) -> None:
    page = ROOT / "docs" / "stowray.1"
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-k", str(page)], capture_output=True, check=True, timeout=60
    )
    assert done.stderr == b""


@pytest.mark.slow
def test_python_recipes_are_typed(tmp_path: Path) -> None:
    """The examples pass a strict type checker against the package's own annotations."""
    pages = [ROOT / "docs" / "howto" / "python.md", ROOT / "README.md"]
    code = [block for page in pages for block in PYTHON.findall(page.read_text(encoding="utf-8"))]
    file = tmp_path / "recipes.py"
    file.write_text("\n".join(code))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
