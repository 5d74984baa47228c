"""ssl_lab: self-supervised and multimodal learning on one shared transformer core."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ssl-lab")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
