"""`python -m tools.predict`: what it does is in command.py."""

from tools.predict.command import run

if __name__ == "__main__":
    run()
