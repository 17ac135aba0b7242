"""Prints the lowest declared version of every direct dependency of a pyproject.toml."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
for dependency in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
    if found := re.match(r"([\w.-]+)(?:\[[\w,]*\])?>=([\w.]+)", dependency):
        print(f"{found[1]}=={found[2]}")
