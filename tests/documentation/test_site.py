"""The site builds without a warning, and needs no network to be read."""

import re
import subprocess
import sys

import pytest
from pages import DOCS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run([*command, DOCS, folder], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*.html")}


def test_pages_load_nothing_from_elsewhere(site):
    loaded = [
        address
        for page in site.values()
        for tag in re.findall(r"<(?:script|link|img|iframe|source|object)\b[^>]*>", page)
        for address in re.findall(r"\b(?:src|href|data)=\"([^\"]*)\"", tag)
    ]
    assert any(address.startswith("_static/") for address in loaded)
    assert not [address for address in loaded if re.match(r"(\w+:)?//", address)]


def test_mathematics_and_roles_are_rendered(site):
    reference = "".join(page for name, page in site.items() if name.parts[0] == "reference")
    assert reference.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') > 40
    for page in site.values():
        text = re.sub(r"<(pre|code|annotation)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.findall(r":(?:func|class|math|mod|meth):|\.\. math::", text)
        assert not re.findall(r"<m[iont]\w*[^>]*>\\", text)
