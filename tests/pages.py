"""The pages of the documentation, the README among them, and the code on them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if "_build" not in path.parts
}


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def run(page):
    """The names that are defined after each block of a page, run from top to bottom."""
    names, after = {"__name__": page}, []
    for number, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
        after.append(dict(names))
    return after


def commands(page):
    """The command lines of a page: those in blocks, indented or fenced, each on one line."""
    text = PAGES[page].replace("\\\n", " ")
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(fenced + re.findall(r"^ {4}(\S.*)", rest, re.MULTILINE)).splitlines()
    return [line for line in lines if line]
