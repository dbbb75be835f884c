"""`python -m tools.verify`: what it does is in command.py."""

from tools.verify.command import run

if __name__ == "__main__":
    run()
