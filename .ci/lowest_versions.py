"""Print the lower bounds of the library's dependencies, and of flax for its tests, for pip."""

import pathlib
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
requirements = project["dependencies"] + [
    requirement
    for requirement in project["optional-dependencies"]["compare"]
    if requirement.startswith("flax")
]
print(*(requirement.replace(">=", "==") for requirement in requirements))
