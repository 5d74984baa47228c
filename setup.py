"""pyproject.toml holds the facts; this adds one step: a wheel carries conf/ inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Copies conf/ (but not a machine's own conf/local) into a wheel; an editable install reads it in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "ssl_lab", "conf")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("conf", target, ignore=shutil.ignore_patterns("local", ".*"))


setup(cmdclass={"build_py": BuildWithConf})
