"""`python -m tools.retrain`: what it does is in command.py."""

from tools.retrain.command import run

if __name__ == "__main__":
    run()
