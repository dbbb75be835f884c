"""`python -m tools.registry`: what it does is in command.py."""

from tools.registry.command import run

if __name__ == "__main__":
    run()
