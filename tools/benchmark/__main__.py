"""`python -m tools.benchmark`: what it does is in command.py."""

from tools.benchmark.command import run

if __name__ == "__main__":
    run()
