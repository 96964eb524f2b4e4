"""cbpt-guard: purify a backdoored CLIP zero-shot classifier, export it, and serve it without torch."""

from importlib.metadata import PackageNotFoundError, version

from cbpt_guard.classifier import GuardedClassifier, Prediction
from cbpt_guard.errors import CbptGuardError
from cbpt_guard.images import ImageLimits

__all__ = ["CbptGuardError", "GuardedClassifier", "ImageLimits", "Prediction", "__version__"]

try:
    __version__ = version("cbpt-guard")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+source"
