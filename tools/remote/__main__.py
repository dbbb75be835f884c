"""`python -m tools.remote`: what it does is in command.py."""

from tools.remote.command import run

if __name__ == "__main__":
    run()
