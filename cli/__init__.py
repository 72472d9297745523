"""The `rarezoo` command. Every verb is one module; what a verb needs is imported when it runs."""

from rarezoo.cli.application import app as app
from rarezoo.cli.application import main as main
