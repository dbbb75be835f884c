"""`python -m tools.monitor`: what it does is in command.py."""

from tools.monitor.command import run

if __name__ == "__main__":
    run()
