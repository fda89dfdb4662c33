"""What setup.py tells setuptools."""

import runpy
from unittest import mock

import setuptools

from tiny_training import REPOSITORY


def setup_arguments() -> dict:
    """The keywords that it is called with."""
    told = {}
    with mock.patch.object(setuptools, "setup", lambda **settings: told.update(settings)):
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return told
