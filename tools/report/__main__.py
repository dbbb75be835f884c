"""`python -m tools.report`: what it does is in command.py."""

from tools.report.command import run

if __name__ == "__main__":
    run()
