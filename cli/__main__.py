"""`python -m rarezoo.cli`, the form that `accelerate launch -m` needs."""

from rarezoo.cli.application import main

main()
