"""`python -m tools.sweep`: what it does is in command.py."""

from tools.sweep.command import run

if __name__ == "__main__":
    run()
