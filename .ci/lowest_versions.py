"""Print the lower bounds of the library's own dependencies as exact versions, for pip."""

import pathlib
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
print(*(requirement.replace(">=", "==") for requirement in project["dependencies"]))
