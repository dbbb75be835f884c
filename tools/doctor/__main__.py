"""`python -m tools.doctor`: what it does is in command.py."""

from tools.doctor.command import run

if __name__ == "__main__":
    run()
